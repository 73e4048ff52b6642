"""Rules of API keys: who gets one, and how one ends."""

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
    """Make a key for the tenant, which is made too if there is none of this name.

    Returns the row and the plaintext, which is shown once and kept nowhere. Raises `ValueError` for a name that is
    empty, blank or longer than 200 characters, and for a `max_priority`, the highest that the key may give a job,
    which is no priority.
    """
    if not -MAX_PRIORITY <= max_priority <= MAX_PRIORITY:
        raise ValueError(f"a priority is between {-MAX_PRIORITY} and {MAX_PRIORITY}; got {max_priority}")
    for what, name in (("tenant", tenant_name), ("key", key_name)):
        if not name.strip() or len(name) > 200 or not name.isprintable():
            raise ValueError(f"a {what}'s name has 1 to 200 printable characters; got {name!r}")
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
    """Make the first key of a new installation, for the tenant `default`; None if any key was ever made."""
    if repository.any_key(session):
        return None
    return create_key(session, settings, DEFAULT_TENANT, "first key")[1]


def revoke_key(session: Session, key_id: str) -> None:
    """End a key and every session made from it. Raises `NotFound` if there is no such key that is still good."""
    if not repository.revoke(session, key_id, utcnow()):
        raise NotFound(f"there is no key {key_id!r} that is still good; `defeat admin keys --list` lists them")
