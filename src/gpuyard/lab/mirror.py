"""The lab's apt repository: simulated NVIDIA packages under the vendor's names, signed with a key of this lab."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from email.utils import formatdate
from functools import cache
from pathlib import Path

from gpuyard.lab import nvml
from gpuyard.lab.host import give_to_owner, run
from gpuyard.lab.models import AptMirror
from gpuyard.lab.packages import recipes
from gpuyard.lab.place import Place, flock, write_atomically

_EPOCH = "1763856000"  # one date in every package: the same recipe gives the same bytes


def build(place: Place) -> None:
    """Make the key and the repository where they are missing or of an older recipe."""
    if whole(place):
        return
    make_key(place)
    fresh = place.state / ".apt.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(_packages(place), fresh)
    publish(fresh, place.state / "apt-key" / "secret.asc")
    write_atomically(fresh / "key.asc", (place.state / "apt-key" / "public.asc").read_text())
    write_atomically(fresh / "recipe", recipe_digest() + "\n")
    shutil.rmtree(place.apt, ignore_errors=True)
    fresh.rename(place.apt)


def publish(folder: Path, key: Path | None, label: str = "simulated NVIDIA packages", date: str = "") -> None:
    """Index a folder of packages anew and sign the index, without a key by one that is drawn and thrown away.

    apt keeps what it has where a repository's date goes back, so what may be taken back gets the date that it had.
    """
    for name in ("Packages", "Packages.gz", "Release", "InRelease", "Release.gpg"):
        (folder / name).unlink(missing_ok=True)
    index = run("apt-ftparchive", "packages", ".", cwd=folder).stdout
    sign(folder, index, key, label, date)


def sign(folder: Path, index: str, key: Path | None, label: str, date: str = "") -> None:
    """Write a repository's index, whose packages may lie elsewhere, and sign it."""
    write_atomically(folder / "Packages", index)
    (folder / "Packages.gz").write_bytes(gzip.compress(index.encode(), mtime=0))
    write_atomically(folder / "Release", _release(folder, label, date or now()))
    with _gpg_home() as gpg:
        if key:
            gpg("--import", key)
        else:
            _draw_key(gpg, "a stranger <stranger@localhost>")
        gpg("--clearsign", "--output", folder / "InRelease", folder / "Release")
        gpg("--armor", "--detach-sign", "--output", folder / "Release.gpg", folder / "Release")


def replace_postinst(deb: Path, text: str) -> None:
    """The same package, whose configuration ends with this shell text."""
    with tempfile.TemporaryDirectory(prefix="gpuyard-deb-") as scratch:
        root = Path(scratch) / "root"
        run("dpkg-deb", "--raw-extract", deb, root)
        deb.unlink()
        postinst = root / "DEBIAN/postinst"
        before = postinst.read_text() if postinst.is_file() else "#!/bin/sh\nset -e\n"
        write_atomically(postinst, f"{before}{text}", 0o755)
        _make_deb(root, deb)


def whole(place: Place) -> bool:
    try:
        return (place.apt / "recipe").read_text().strip() == recipe_digest() and (place.apt / "InRelease").is_file()
    except FileNotFoundError:
        return False


@cache
def recipe_digest() -> str:
    """Changes with everything a package is made of."""
    sources = [Path(__file__), *Path(recipes.__file__).parent.glob("*.py")]
    content = b"".join(path.read_bytes() for path in sorted(sources)) + nvml.digest().encode()
    return hashlib.sha256(content).hexdigest()[:12]


def access(place: Place, uri: str) -> AptMirror:
    key = place.state / "apt-key"
    fingerprint = (key / "fingerprint").read_text().strip()
    return AptMirror(uri=uri, key=(key / "public.asc").read_text(), fingerprint=fingerprint)


def _packages(place: Place) -> Path:
    """All packages, built once for all labs of this machine."""
    shelf = place.cache / "lab"
    built = shelf / f"packages-{recipe_digest()}"
    shelf.mkdir(parents=True, exist_ok=True)
    with flock(shelf / ".packages.lock"):
        if not built.is_dir():
            with tempfile.TemporaryDirectory(dir=shelf, prefix=".packages-") as scratch:
                done = Path(scratch) / "done"
                done.mkdir()
                parts = nvml.built(place.cache)
                for package in recipes.packages():
                    build_package(package, Path(scratch) / package.name, done, parts)
                done.rename(built)
                built.chmod(0o755)
                give_to_owner(built, *built.iterdir(), shelf / ".packages.lock")
    return built


def build_package(package: recipes.Package, root: Path, into: Path, parts: Path = Path()) -> Path:
    """`parts` is where set-up built what the package takes of it."""
    shutil.rmtree(root, ignore_errors=True)
    for path, text in package.files.items():
        write_atomically(root / path, text)
    for path, text in package.programs.items():
        write_atomically(root / path, text, 0o755)
    for path, name in package.built.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(parts / name, root / path)
        (root / path).chmod(0o755)
    for path, target in package.links.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    write_atomically(root / "DEBIAN/control", package.control)
    for name, text in {"postinst": package.postinst, "prerm": package.prerm}.items():
        if text:
            write_atomically(root / "DEBIAN" / name, f"#!/bin/sh\nset -e\n{text}\n", 0o755)
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    return _make_deb(root, into / f"{package.name}_{package.version}_amd64.deb")


def _make_deb(root: Path, deb: Path) -> Path:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": _EPOCH}
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", root, deb, env=environment)
    return deb


def now() -> str:
    return formatdate(usegmt=True).replace("GMT", "UTC")


def date_of(folder: Path) -> str:
    """When a repository was made, as its Release says."""
    lines = (folder / "Release").read_text().splitlines()
    return next(line.removeprefix("Date: ") for line in lines if line.startswith("Date: "))


def _release(folder: Path, label: str, date: str) -> str:
    """The list of lists, that is what is signed. Flat, as the vendor's repository is."""
    sums = ""
    for name in ("Packages", "Packages.gz"):
        data = (folder / name).read_bytes()
        sums += f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n"
    return f"Origin: gpuyard-lab\nLabel: {label}\nArchitectures: amd64\nDate: {date}\nSHA256:\n{sums}"


def make_key(place: Place) -> None:
    """The key of this lab, drawn once: secret, public and its fingerprint below `apt-key`."""
    secret = place.state / "apt-key" / "secret.asc"
    if not secret.is_file():
        with _gpg_home() as gpg:
            _draw_key(gpg, "gpuyard lab repository <lab@localhost>")
            listing = gpg("--with-colons", "--list-keys")
            fingerprint = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:"))
            write_atomically(secret.with_name("public.asc"), gpg("--armor", "--export"))
            write_atomically(secret.with_name("fingerprint"), fingerprint + "\n")
            write_atomically(secret, gpg("--armor", "--export-secret-keys"), 0o600)


def _draw_key(gpg: Callable[..., str], user: str) -> None:
    gpg("--passphrase", "", "--quick-generate-key", user, "ed25519", "sign", "never")


@contextlib.contextmanager
def _gpg_home() -> Generator[Callable[..., str]]:
    """gpg with an empty home that is gone afterwards, and so is the agent it starts.

    Not in the lab's own folder: gpg's socket would lie there, and a socket's path may have 107 letters at most.
    """
    with tempfile.TemporaryDirectory(prefix="gpuyard-gpg-") as home:

        def gpg(*words: str | Path) -> str:
            return run("gpg", "--homedir", home, "--batch", "--quiet", *words).stdout

        try:
            yield gpg
        finally:
            run("gpgconf", "--homedir", home, "--kill", "all", check=False)
