import pytest

from app.db import Database
from app.http.auth import find_caller
from app.keys.__main__ import main
from app.keys.service import create_key, first_key
from app.models import ApiKey, Tenant
from app.settings import Settings


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command and return (exit code, output, errors)."""
    monkeypatch.setattr("app.keys.__main__.get_settings", lambda: settings)

    def _run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return _run


def test_the_first_key_is_made_once(database: Database, settings: Settings):
    with database.write() as session:
        plaintext = first_key(session, settings)
    with database.write() as session:
        assert first_key(session, settings) is None
    with database.read() as session:
        caller = find_caller(session, settings, plaintext)
        assert session.get_one(Tenant, caller.tenant_id).name == "default"


def test_the_command_prints_a_key_that_works(database: Database, settings: Settings, run):
    code, first, _ = run("--tenant", "lab", "--name", "ci")
    assert code == 0
    _, second, _ = run("--tenant", "lab", "--name", "laptop")
    with database.read() as session:
        one, two = (find_caller(session, settings, plaintext.strip()) for plaintext in (first, second))
    assert one.tenant_id == two.tenant_id
    assert one.key_id != two.key_id


def test_keys_are_listed_without_their_secrets_and_revoked(database: Database, settings: Settings, run):
    _, plaintext, _ = run("--tenant", "lab", "--name", "ci")
    code, listed, _ = run("--list")
    assert code == 0
    key_id, tenant, name, _, state = listed.strip().split("\t")
    assert (tenant, name, state) == ("lab", "ci", "good")
    assert plaintext.strip() not in listed
    assert run("--revoke", key_id)[0] == 0
    with database.read() as session:
        assert find_caller(session, settings, plaintext.strip()) is None
    assert "revoked" in run("--list")[1]
    code, _, error = run("--revoke", key_id)
    assert code == 1
    assert key_id in error


@pytest.mark.parametrize("arguments", [(), ("--tenant", "lab"), ("--list", "--tenant", "a", "--name", "b")])
def test_the_command_says_how_it_is_used(run, arguments: tuple[str, ...]):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "a\nb"])
def test_names_are_names(database: Database, settings: Settings, run, name: str):
    code, _, error = run("--tenant", name, "--name", "ci")
    assert code == 1
    assert "1 to 200 printable characters" in error
    with pytest.raises(ValueError, match="a key's name"), database.write() as session:
        create_key(session, settings, "lab", name)
    with database.read() as session:
        assert session.query(ApiKey).count() == 0
