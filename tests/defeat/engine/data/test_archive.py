"""Malicious and broken archives, each refused by name; every good kind unpacked."""

import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from defeat.engine.data import archive
from defeat.engine.report import Cancelled, RunError
from tests.support.datasets import put, tar_of, tar_with, zip_of

MIB = 1024 * 1024
Write = Callable[[Path], Path]


def unpack(path: Path, *, max_bytes: int = 10**9, max_files: int = 1000) -> Path:
    target = path.parent / "out"
    archive.unpack(path, target, max_bytes=max_bytes, max_files=max_files, tick=lambda _: None)
    return target


def refusal(path: Path, **limits: int) -> RunError:
    with pytest.raises(RunError) as caught:
        unpack(path, **limits)
    assert caught.value.failure_class == "data"
    assert not (path.parent.parent / "escaped").exists()
    return caught.value


def zip_with(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members:
            target.writestr(name, content)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    put(root / "a/b/one.txt", "1" * 3 * MIB)
    put(root / "a/zwei ü.txt", "2")
    put(root / ("long" * 40) / ("name" * 40), "3")
    return root


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_every_kind_unpacks_whatever_its_name(tree: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "upload.bin"
    if mode == "zip":
        zip_of(tree, path)
    else:
        tar_of(tree, path, mode)
    out = unpack(path)
    files = {file.relative_to(tree): file.read_bytes() for file in tree.rglob("*") if file.is_file()}
    assert {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar(tmp_path: Path, tar_format: int) -> None:
    put(tmp_path / "tree" / ("d" * 90) / ("f" * 60), "x")
    with tarfile.open(tmp_path / "x", "w", format=tar_format) as target:
        target.add(tmp_path / "tree", "t")
    assert (unpack(tmp_path / "x") / "t" / ("d" * 90) / ("f" * 60)).read_text() == "x"


def test_modes_in_the_archive_are_not_taken_over(tmp_path: Path) -> None:
    info = member("run.sh")
    info.mode = 0o4777
    out = unpack(tar_with(tmp_path / "x", [(info, b"")]))
    assert (out / "run.sh").stat().st_mode & 0o7111 == 0


UNSAFE = {
    "/escaped": "'/escaped'",
    "../escaped": "'../escaped'",
    "a/../../escaped": "'a/../../escaped'",
    "..\\escaped": "'..\\escaped'",
    "C:\\escaped": "'C:\\escaped'",
    "\\escaped": "'\\escaped'",
    "new\nline": r"'new\nline'",
    "esc\x1b[2J": r"'esc\x1b[2J'",
    "n" * 300: "nnn…",
    "d/" * 600 + "f": "d/d…",
}


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unsafe_paths_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "x"
    error = refusal(zip_with(path, (name, b"x")) if kind == "zip" else tar_with(path, [(member(name), b"x")]))
    assert error.code == "unsafe_path"
    assert UNSAFE[name] in error.detail


def test_a_zip_name_is_not_cut_at_a_nul(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "x", ("good.txtQevil", b"x"))
    path.write_bytes(path.read_bytes().replace(b"good.txtQevil", b"good.txt\0evil"))
    assert refusal(path).code == "unsafe_path"


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "x", [(member("caf\udce9"), b"x")])
    error = refusal(path)
    assert (error.code, "caf" in error.detail) == ("unsafe_path", True)
    error.detail.encode()  # the detail itself can be stored


@pytest.mark.parametrize(
    "info",
    [
        member("bad", tarfile.SYMTYPE, "/etc/passwd"),
        member("bad", tarfile.LNKTYPE, "a"),
        member("bad", tarfile.CHRTYPE),
        member("bad", tarfile.BLKTYPE),
        member("bad", tarfile.FIFOTYPE),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, info: tarfile.TarInfo) -> None:
    error = refusal(tar_with(tmp_path / "x", [(info, b"")]))
    assert (error.code, "'bad'" in error.detail) == ("link_in_archive", True)


def test_a_symlink_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("bad")
    info.external_attr = 0o120777 << 16
    assert refusal(zip_with(tmp_path / "x", (info, b"/etc/passwd"))).code == "link_in_archive"


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    header = bytearray(member("bad", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(10240))
    assert refusal(path).code == "link_in_archive"


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "x", ("secret.txt", b"x"))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    error = refusal(path)
    assert (error.code, "secret.txt" in error.detail) == ("encrypted_archive", True)


def test_a_zip_with_unbounded_compression_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_BZIP2) as target:
        target.writestr("a", b"x")
    assert refusal(tmp_path / "x").code == "unsupported_compression"


@pytest.mark.parametrize(
    "members",
    [["a", "a"], ["d/a", "d/./a"], ["d/a", "d\\a"], ["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_colliding_paths_are_refused(tmp_path: Path, members: list[str], kind: str) -> None:
    if kind == "zip":
        path = zip_with(tmp_path / "x", *((name, b"x") for name in members))
    else:
        path = tar_with(tmp_path / "x", [(member(name), b"x") for name in members])
    error = refusal(path)
    assert (error.code, "member '" in error.detail) == ("duplicate_path", True)


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz"])
def test_limits_on_bytes_and_files_are_exact(tmp_path: Path, mode: str) -> None:
    root = tmp_path / "tree"
    for name in "abc":
        put(root / name, b"x" * 1000)
    path = zip_of(root, tmp_path / "x") if mode == "zip" else tmp_path / "x"
    if mode != "zip":
        tar_with(path, [(member(name), b"x" * 1000) for name in "abc"], mode)
    error = refusal(path, max_bytes=2999)
    assert (error.code, "'c'" in error.detail, "2999" in error.detail) == ("archive_too_large", True, True)
    for left in (tmp_path / "out").iterdir():
        left.unlink()
    error = refusal(path, max_files=2)
    assert (error.code, "'c'" in error.detail) == ("archive_too_large", True)
    for left in (tmp_path / "out").iterdir():
        left.unlink()
    unpack(path, max_bytes=3000, max_files=3)


def test_folders_that_a_member_implies_count(tmp_path: Path) -> None:
    assert refusal(zip_with(tmp_path / "x", ("a/b/c/d/e", b"")), max_files=4).code == "archive_too_large"


@pytest.fixture
def little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "FREE_BYTES", 2 * MIB)


@pytest.mark.usefixtures("little_is_free")
@pytest.mark.parametrize("mode", ["zip", "w:gz", "w:bz2", "w:xz"])
def test_absurd_expansion_is_refused(tmp_path: Path, mode: str) -> None:
    zeros = bytes(20 * MIB)
    path = tmp_path / "x"
    if mode == "zip":
        zip_with(path, ("zeros", zeros))
    else:
        tar_with(path, [(member("zeros"), zeros)], mode)
    error = refusal(path)
    assert (error.code, "'zeros'" in error.detail, "200 times" in error.detail) == ("archive_too_large", True, True)
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= 20 * MIB // 2


@pytest.mark.usefixtures("little_is_free")
def test_bytes_after_the_end_of_a_tar_count_too(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "x", "wb") as file:
        file.write(bytes(20 * MIB))
    assert refusal(tmp_path / "x").code == "archive_too_large"


@pytest.mark.usefixtures("little_is_free")
def test_overlapping_members_of_a_zip_bomb_do_not_hang(tmp_path: Path) -> None:
    """Every entry of the table points at the same compressed data, as in the 42 kB bombs."""
    path = zip_with(tmp_path / "x", ("a00", bytes(MIB)))
    data = path.read_bytes()
    directory, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entries = b"".join(data[directory:end].replace(b"a00", b"a%02d" % number) for number in range(100))
    trailer = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 100, 100, len(entries), directory, 0)
    path.write_bytes(data[:directory] + entries + trailer)
    assert refusal(path).code in ("archive_too_large", "broken_archive")


def test_a_table_of_contents_beyond_the_limit_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_CHUNK", 1000)
    path = zip_with(tmp_path / "x", *((f"{number:04}", b"") for number in range(1000)))
    monkeypatch.setattr(zipfile, "ZipInfo", None)  # making one would fail
    assert refusal(path, max_files=999).code == "archive_too_large"
    assert refusal(path, max_files=1).code == "archive_too_large"


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_claims_gigabytes_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = member("x", kind)
    info.size = 4 * 1024 * MIB
    (tmp_path / "x").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(MIB))
    assert refusal(tmp_path / "x").code == "broken_archive"


def test_long_digits_in_an_extended_header_are_refused(tmp_path: Path) -> None:
    info = member("x", tarfile.XHDTYPE)
    info.size = 512 * 1024
    (tmp_path / "x").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + b"1" * info.size + bytes(MIB))
    assert refusal(tmp_path / "x").code == "broken_archive"


def test_endless_long_names_are_refused(tmp_path: Path) -> None:
    info = member("x", tarfile.GNUTYPE_LONGNAME)
    (tmp_path / "x").write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 5000)
    assert refusal(tmp_path / "x").code == "broken_archive"


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_truncated_archive_is_refused(tmp_path: Path, mode: str, keep: float) -> None:
    noise = random.Random(0).randbytes(100_000)
    path = tmp_path / "x"
    if mode == "zip":
        zip_with(path, ("a", noise), ("b", noise))
    else:
        tar_with(path, [(member("a"), noise), (member("b"), noise)], mode)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert refusal(path).code == "broken_archive"


def test_a_tar_cut_between_members_is_refused(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "x", [(member("a"), b"1" * 512), (member("b"), b"2" * 512)])
    path.write_bytes(path.read_bytes()[:1024])
    error = refusal(path)
    assert (error.code, "'a'" in error.detail, "truncated" in error.detail) == ("broken_archive", True, True)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "x", [(member("a"), b"1" * 512), (member("b"), b"2" * 512)])
    data = bytearray(path.read_bytes())
    data[1024:1030] = b"oh no!"
    path.write_bytes(data)
    error = refusal(path)
    assert (error.code, "'a'" in error.detail, "damaged" in error.detail) == ("broken_archive", True, True)


@pytest.mark.parametrize("mode", ["zip", "w:gz", "w:bz2", "w:xz"])
def test_flipped_bits_are_refused(tmp_path: Path, mode: str) -> None:
    noise = random.Random(0).randbytes(2_000_000)
    path = tmp_path / "x"
    if mode == "zip":
        zip_with(path, ("a", noise))
    else:
        tar_with(path, [(member("a"), noise)], mode)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    assert refusal(path).code == "broken_archive"


def test_a_wrong_checksum_at_the_very_end_is_refused(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "x", [(member("a"), b"1" * 512)], "w:gz")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    assert refusal(path).code == "broken_archive"


def test_xz_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    tar = tar_with(tmp_path / "x.tar", [(member("a"), b"1" * 512)]).read_bytes()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 * MIB}]
    compressor = lzma.LZMACompressor(filters=filters)
    data = bytearray(compressor.compress(tar) + compressor.flush())
    (tmp_path / "x").write_bytes(data)
    assert refusal(tmp_path / "x").code == "broken_archive"


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"%PDF-1.7 " * 200, gzip.compress(b"not a tar" * 100, mtime=0), b"\x89PNG"]
)
def test_other_content_is_refused_with_the_kinds_that_would_do(tmp_path: Path, content: bytes) -> None:
    path = put(tmp_path / "dataset.zip", content)
    error = refusal(path)
    assert (error.code, archive.KINDS in error.detail) == ("not_an_archive", True)


def test_a_zip_member_before_the_start_is_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "x", ("a", b"x"))
    data = bytearray(path.read_bytes())
    end = data.index(b"PK\x05\x06")
    data[end + 16] += 1  # where the table of contents is said to be: zipfile moves every member by the difference
    path.write_bytes(data)
    assert refusal(path).code == "broken_archive"


def test_an_empty_archive_is_an_archive(tmp_path: Path) -> None:
    assert list(unpack(zip_with(tmp_path / "x")).iterdir()) == []
    assert list(unpack(tar_with(tmp_path / "x", [])).iterdir()) == []


@pytest.mark.parametrize("mode", ["zip", "w:gz"])
def test_unpacking_can_be_cancelled_within_a_member(tmp_path: Path, mode: str) -> None:
    noise = random.Random(0).randbytes(4_000_000)
    path = tmp_path / "x"
    if mode == "zip":
        zip_with(path, ("a", noise))
    else:
        tar_with(path, [(member("a"), noise)], mode)
    fractions: list[float] = []

    def tick(fraction: float) -> None:
        fractions.append(fraction)
        if len(fractions) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        archive.unpack(path, tmp_path / "out", max_bytes=10**9, max_files=9, tick=tick)
    assert (tmp_path / "out/a").stat().st_size < len(noise)


def test_a_full_disk_is_not_called_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_with(tmp_path / "x", ("a", b"x"))
    opened = Path.open

    def full(self: Path, mode: str = "r", **kwargs: object) -> io.IOBase:
        if mode == "xb":
            raise OSError(28, "No space left on device", str(self))
        return opened(self, mode, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(path)
