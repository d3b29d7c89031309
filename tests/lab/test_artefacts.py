"""What the artefact server gives out, and what it does not."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from gpuyard.lab import artefacts


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia/a.deb").write_text("a package")
    (tmp_path / "nvidia/.half.deb").write_text("half a package")
    (tmp_path / "secret").write_text("secret")
    handler = partial(artefacts._Artefacts, who="us", views=tmp_path / "views", roots={"nvidia": tmp_path / "nvidia"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join(10)


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_files_are_served_also_under_the_path_that_apt_asks_for(server: str) -> None:
    assert get(f"{server}/nvidia/a.deb") == (200, "a package")
    assert get(f"{server}/nvidia/./a.deb") == (200, "a package")


def test_it_says_who_it_is(server: str) -> None:
    assert get(f"{server}/health") == (200, "us")


@pytest.mark.parametrize(
    "path", ["/secret", "/nvidia/../secret", "/nvidia/%2e%2e/secret", "/nvidia/.half.deb", "/other/a.deb", "/"]
)
def test_nothing_else_is_served(server: str, path: str) -> None:
    assert get(server + path)[0] == 404


def test_a_client_with_a_view_of_its_own_sees_that_and_afterwards_what_all_see(server: str, tmp_path: Path) -> None:
    own = tmp_path / "views/127.0.0.1/nvidia"
    own.mkdir(parents=True)
    (own / "b.deb").write_text("another package")
    assert get(f"{server}/nvidia/b.deb") == (200, "another package")
    assert get(f"{server}/nvidia/a.deb")[0] == 404
    own.rename(tmp_path / "gone")
    request = urllib.request.Request(
        f"{server}/nvidia/a.deb", headers={"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.read() == b"a package", "older than what the client has, and yet what it should have"
