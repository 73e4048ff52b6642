"""API keys: creating and revoking them."""

from sqlalchemy.orm import Session

from app.db import utcnow
from app.errors import NotFound
from app.http.auth import hash_key, new_key
from app.ids import new_id
from app.keys import repository
from app.models import MAX_PRIORITY, ApiKey, Tenant
from app.settings import Settings

DEFAULT_TENANT = "default"


def create_key(
    session: Session, settings: Settings, tenant_name: str, key_name: str, *, max_priority: int = MAX_PRIORITY
) -> tuple[ApiKey, str]:
    """Create a key for the tenant, and the tenant if there is none of this name.

    Returns the row and the plaintext, which is not stored. `max_priority` is the highest priority that the key may
    give a job. Raises `ValueError` for a name that is blank, longer than 200 characters or not printable, and for a
    `max_priority` outside -100 to 100.
    """
    if not -MAX_PRIORITY <= max_priority <= MAX_PRIORITY:
        raise ValueError(f"max_priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}; got {max_priority}")
    for what, name in (("tenant", tenant_name), ("key", key_name)):
        if not name.strip() or len(name) > 200 or not name.isprintable():
            raise ValueError(f"a {what}'s name must have 1 to 200 printable characters; got {name!r}")
    tenant = repository.tenant_by_name(session, tenant_name)
    if tenant is None:
        tenant = Tenant(id=new_id("ten"), name=tenant_name)
        session.add(tenant)
        session.flush()
    plaintext = new_key()
    row = ApiKey(
        id=new_id("key"),
        tenant_id=tenant.id,
        name=key_name,
        key_hash=hash_key(settings, plaintext),
        max_priority=max_priority,
    )
    session.add(row)
    session.flush()
    return row, plaintext


def first_key(session: Session, settings: Settings) -> str | None:
    """Create the first key of a new installation, for the tenant `default`; None if any key exists."""
    if repository.any_key(session):
        return None
    return create_key(session, settings, DEFAULT_TENANT, "first key")[1]


def revoke_key(session: Session, key_id: str) -> None:
    """Revoke a key, which ends its sessions. Raises `NotFound` if there is no such key, or it is revoked already."""
    if not repository.revoke(session, key_id, utcnow()):
        raise NotFound(f"there is no key {key_id!r}, or it is revoked already; `defeat admin keys --list` lists them")
