"""Queries on tenants and API keys."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import exists, select, update
from sqlalchemy.orm import Session

from app.db import update_count
from app.models import ApiKey, Tenant


def tenant_by_name(session: Session, name: str) -> Tenant | None:
    """Return the tenant of this name, or None."""
    return session.scalars(select(Tenant).where(Tenant.name == name)).one_or_none()


def any_key(session: Session) -> bool:
    """Return whether there is any key, revoked or not."""
    return bool(session.scalar(select(exists(select(ApiKey.id)))))


def all_keys(session: Session) -> Sequence[tuple[ApiKey, Tenant]]:
    """Return every key with its tenant, oldest first."""
    statement = select(ApiKey, Tenant).join(Tenant, ApiKey.tenant_id == Tenant.id).order_by(ApiKey.created_at)
    return [(key, tenant) for key, tenant in session.execute(statement)]


def revoke(session: Session, key_id: str, moment: datetime) -> bool:
    """Revoke a key; return False if there is no such key or it is revoked already."""
    statement = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=moment)
    return update_count(session, statement) == 1
