import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from app.db import make_engine
from app.migrate import downgrade, upgrade
from app.models import Base
from tests.support.racing import race


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'made' / 'defeat.sqlite3'}"
    return request.getfixturevalue("empty_postgres_url")


def _tables(url: str) -> set[str]:
    engine = make_engine(url)
    try:
        return set(inspect(engine).get_table_names()) - {"alembic_version"}
    finally:
        engine.dispose()


def _comparable(dialect: str):
    """SQLite does not tell that an index runs downwards; PostgreSQL's own case compares that one."""
    return lambda _object, name, *_: dialect != "sqlite" or name != "ix_jobs_next"


def test_up_down_and_up_again_leaves_the_models_schema(empty_url):
    upgrade(empty_url)
    assert _tables(empty_url) == set(Base.metadata.tables)
    downgrade(empty_url, "base")
    assert _tables(empty_url) == set()
    upgrade(empty_url)
    upgrade(empty_url)
    engine = make_engine(empty_url)
    with engine.connect() as connection:
        opts = {"compare_type": True, "render_as_batch": True, "include_object": _comparable(connection.dialect.name)}
        context = MigrationContext.configure(connection, opts=opts)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_several_starters_at_once_migrate_once(empty_url):
    race(lambda _number: upgrade(empty_url), 4)
    assert _tables(empty_url) == set(Base.metadata.tables)
