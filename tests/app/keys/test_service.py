import pytest

from app.db import Database
from app.http.auth import find_caller
from app.keys.service import create_key, first_key
from app.models import ApiKey, Tenant
from app.settings import Settings


def test_the_first_key_is_made_once(database: Database, settings: Settings):
    with database.write() as session:
        plaintext = first_key(session, settings)
    with database.write() as session:
        assert first_key(session, settings) is None
    with database.read() as session:
        caller = find_caller(session, settings, plaintext)
        assert session.get_one(Tenant, caller.tenant_id).name == "default"


def test_the_command_prints_a_key_that_works(database: Database, settings: Settings, admin):
    code, first, _ = admin("keys", "--tenant", "lab", "--name", "ci")
    assert code == 0
    _, second, _ = admin("keys", "--tenant", "lab", "--name", "laptop")
    with database.read() as session:
        one, two = (find_caller(session, settings, plaintext.strip()) for plaintext in (first, second))
    assert one.tenant_id == two.tenant_id
    assert one.key_id != two.key_id


def test_keys_are_listed_without_their_secrets_and_revoked(database: Database, settings: Settings, admin):
    _, plaintext, _ = admin("keys", "--tenant", "lab", "--name", "ci")
    code, listed, _ = admin("keys", "--list")
    assert code == 0
    key_id, tenant, name, _, state = listed.strip().split("\t")
    assert (tenant, name, state) == ("lab", "ci", "good")
    assert plaintext.strip() not in listed
    assert admin("keys", "--revoke", key_id)[0] == 0
    with database.read() as session:
        assert find_caller(session, settings, plaintext.strip()) is None
    assert "revoked" in admin("keys", "--list")[1]
    code, _, error = admin("keys", "--revoke", key_id)
    assert code == 1
    assert key_id in error


@pytest.mark.parametrize("arguments", [(), ("--tenant", "lab"), ("--list", "--tenant", "a", "--name", "b")])
def test_the_command_says_how_it_is_used(admin, arguments: tuple[str, ...]):
    assert admin("keys", *arguments)[0] == 2


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "a\nb"])
def test_names_are_names(database: Database, settings: Settings, admin, name: str):
    code, _, error = admin("keys", "--tenant", name, "--name", "ci")
    assert code == 1
    assert "1 to 200 printable characters" in error
    with pytest.raises(ValueError, match="a key's name"), database.write() as session:
        create_key(session, settings, "lab", name)
    with database.read() as session:
        assert session.query(ApiKey).count() == 0
