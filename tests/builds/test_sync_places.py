"""Where builds are looked for: what pip is configured with, as pip says it; folders and file addresses; credentials and
certificates.
"""

import os
import shutil
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import certifi
import pytest
from local_index import ELSEWHERE, GIT, HERE, Listed, LocalIndex, html_page, send
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from fpxbench.builds.index.fetch import Fetcher, Unreachable, without_credentials
from fpxbench.builds.index.listing import extra_location, index_location, pip_locations
from fpxbench.builds.index.pip_settings import NoPip, PipSettings, parse_settings, pip_settings
from fpxbench.builds.timeline import Timeline
from fpxbench.builds.timeline.sync import sync

R13, R14 = Listed("2.13.0", triton="triton==3.7.1"), Listed("2.14.1", triton="triton~=3.8.0")


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Return what pip says with `text` in a file that goes before all others, or with no file read at all, and
    `variables` in the environment."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)

    def settings(text=None, **variables):
        (tmp_path / "pip.conf").write_text(text or "")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf") if text else os.devnull)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return pip_settings()

    return settings


IMPATIENT = PipSettings(timeout_s=2, retries=0)


def synced(tmp_path, places, settings=IMPATIENT):
    timeline = Timeline(tmp_path / "timeline")
    return timeline, sync(timeline, places, Fetcher(settings))


# -- pip's configuration
# ----------------------------------------------------------------------------------------------------


def test_pip_itself_says_what_it_is_configured_with(configured):
    found = configured(
        "[global]\nindex-url = https://mirror.example/simple\nextra-index-url =\n    https://one.example/simple\n    https://two.example/simple\n"
        "cert = /etc/ssl/mirror.pem\nclient_cert = /etc/ssl/me.pem\nproxy = http://proxy.example:3128\n"
        "trusted-host = one.example\ntimeout = 7\nretries = 4\nno-index = off\n[install]\nfind-links = /wheels\n"
        "[download]\nfind-links = /elsewhere\n")
    assert found == PipSettings(
        index_url="https://mirror.example/simple",
        extra_index_urls=("https://one.example/simple", "https://two.example/simple"),
        find_links=("/wheels",), cert="/etc/ssl/mirror.pem", client_cert="/etc/ssl/me.pem",
        proxy="http://proxy.example:3128",
        trusted_hosts=("one.example",), timeout_s=7.0, retries=4)


def test_the_environment_goes_before_the_file_and_an_empty_value_is_none(configured):
    found = configured("[global]\nindex-url = https://mirror.example/simple\nno-index = true\ncert = /mirror.pem\n",
                       PIP_INDEX_URL="https://other.example/simple", PIP_NO_INDEX="0", PIP_CERT="",
                       PIP_DEFAULT_TIMEOUT="3", PIP_FIND_LINKS="/a /b")
    assert (found.index_url, found.no_index, found.cert, found.timeout_s) == ("https://other.example/simple", False,
                                                                              "/mirror.pem", 3.0)
    assert found.find_links == ("/a", "/b")


def test_a_pip_without_configuration_looks_where_pip_looks(configured):
    found = configured()
    assert found.index_url == PYPI_SIMPLE_ENDPOINT
    assert [one.arguments for one in pip_locations(found)] == [()], "pip needs no option for a place that it knows"


def test_no_index_leaves_the_folders(configured, tmp_path):
    found = configured(f"[global]\nno-index = yes\nfind-links = {tmp_path}\n")
    assert pip_locations(found) == [index_location(str(tmp_path), links=True)]


def test_a_configuration_that_pip_cannot_read_is_one_sentence(configured):
    with pytest.raises(NoPip, match="pip cannot read its own configuration: ") as caught:
        configured("index-url = https://mirror.example\n")
    assert "\n" not in str(caught.value)


def test_a_timeout_that_is_none_is_named():
    with pytest.raises(NoPip, match="soon"):
        parse_settings("global.timeout='soon'\n")


def test_a_python_without_pip_asks_the_one_on_the_path_and_without_any_the_way_out_is_named(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(NoPip, match="name one with --index"):
        pip_settings(python)
    pip = tmp_path / "bin/pip"
    pip.write_text("#!/bin/sh\necho \"global.index-url='https://mirror.example/simple'\"\n")
    pip.chmod(0o755)
    assert pip_settings(python).index_url == "https://mirror.example/simple"


# -- folders and file addresses
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Return wheels in a folder, other projects' among them."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for one in (R13, R14):
        (folder / one.name).write_bytes(one.data)
    (folder / "torchvision-0.28.0-py3-none-any.whl").write_bytes(b"")
    (folder / "torch-2.12.0.tar.gz").write_bytes(b"")
    (folder / f"torch-2.12.0-{ELSEWHERE.replace('manylinux2014', 'macosx_14_0')}.whl").write_bytes(b"")
    return folder


@pytest.fixture
def file_index(tmp_path, folder):
    """Return an index as a folder: ``simple/torch/index.html``, whose links lead to the wheels."""
    page = tmp_path / "simple" / "torch" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_bytes(html_page([R13, R14]).replace(b"../../files/", b"../../wheels/"))
    return tmp_path / "simple"


@pytest.mark.parametrize("as_address", [False, True])
def test_a_folder_of_wheels_is_a_place_and_they_tell_their_triton_and_commit(tmp_path, folder, as_address):
    timeline, result = synced(tmp_path, [index_location(folder.as_uri() if as_address else str(folder), links=True)])
    assert result.added == ["2.13.0", "2.14.1"] and not result.problems and not result.remarks
    assert [(entry.own_triton, entry.git, entry.marks) for entry in timeline.entries()] == [("3.7.1", GIT, []),
                                                                                            ("3.8.0", GIT, [])]


def test_an_index_of_files_is_a_place(tmp_path, file_index):
    timeline, result = synced(tmp_path, [index_location(file_index.as_uri())])
    assert result.added == ["2.13.0", "2.14.1"] and not result.problems
    assert [entry.own_triton for entry in timeline.entries()] == ["3.7.1", "3.8.0"]


def test_a_path_says_by_itself_whether_it_is_an_index_or_links(folder, file_index):
    assert extra_location(str(folder)).arguments == ("--find-links", folder.as_uri())
    assert extra_location(str(file_index)).arguments == ("--extra-index-url", file_index.as_uri())


def test_an_index_of_files_without_pytorch_lists_nothing_and_a_missing_folder_is_reported(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    settings = PipSettings(index_url=(tmp_path / "empty").as_uri(), find_links=(str(folder),))
    _, result = synced(tmp_path, pip_locations(settings))
    assert result.added == ["2.13.0", "2.14.1"] and not result.problems
    shutil.rmtree(folder)
    timeline, result = synced(tmp_path, pip_locations(settings))
    assert f"{folder} does not exist" in result.problems[0]
    assert not any(entry.vanished for entry in timeline.entries()), "a folder that is gone says nothing about builds"


def test_a_page_of_links_is_a_place(tmp_path):
    page = html_page([R13, R14]).replace(b"../../files/", b"files/").replace(R13.name.encode() + b"</a>",
                                                                             b"torch-2.13.0..&gt;</a>")
    with LocalIndex(R13, R14) as index:
        index.faults["^/links.html$"] = lambda request: send(request, 200, page, "text/html")
        timeline, result = synced(tmp_path,
                                  [index_location(f"{index.url.removesuffix('/simple')}/links.html", links=True)])
    assert result.added == ["2.13.0",
        "2.14.1"] and not result.problems, "the address of a link tells its name; its text may be shortened"


@pytest.mark.parametrize("url", ["ftp://example.com/simple", "s3://bucket/simple"])
def test_an_address_of_another_kind_is_refused(url):
    with pytest.raises(ValueError, match="not a package index: use an https, http or file address"):
        index_location(url)


# -- how it is got
# ----------------------------------------------------------------------------------------------------------


def test_credentials_reach_the_index_and_no_stored_or_printed_text(tmp_path):
    with LocalIndex(R13) as index:
        url = index.url.replace("http://", "http://me:s3cret@")
        timeline, result = synced(tmp_path, [extra_location(url)])
        assert index.headers["Authorization"].startswith("Basic ")
        (entry,) = timeline.entries()
        index.faults["."] = lambda request: send(request, 500, b"")
        _, failed = synced(tmp_path, [extra_location(url)])
    assert result.added == ["2.13.0"] and failed.problems
    commit = subprocess.check_output(["git", "-C", timeline.path, "show", "2.13.0"])
    texts = f"{result} {failed} {entry} {entry.pins().requirements} {commit}"
    assert "s3cret" not in texts and index.url in texts


def test_a_query_may_be_a_signature_and_is_not_shown():
    assert without_credentials("https://me:pw@host:8443/a/b.whl?signature=abc#sha256=1") == "https://host:8443/a/b.whl"


def test_plain_http_is_refused_unless_the_host_is_trusted():
    with pytest.raises(Unreachable, match="plain http.*trusted-host"):
        Fetcher(PipSettings()).get("http://mirror.invalid/simple/torch/")
    with pytest.raises(Unreachable, match="its name does not resolve|cannot be re"):
        Fetcher(PipSettings(trusted_hosts=("mirror.invalid",), timeout_s=1,
                            retries=0)).get("http://mirror.invalid/simple/torch/")


def test_only_the_trusted_host_goes_without_its_certificate():
    session = Fetcher(PipSettings(trusted_hosts=("example.com", "mirror.example:8443")))._session
    default = session.get_adapter("https://pytorch.org/")
    for url in ("https://example.com/simple/", "https://example.com:8443/simple/", "https://mirror.example:8443/a"):
        assert session.get_adapter(url) is not default, url
    for url in ("https://example.com.evil.org/", "https://example.community/", "https://mirror.example:9443/a",
                "https://mirror.example/"):
        assert session.get_adapter(url) is default, url


def test_the_proxy_is_used(tmp_path):
    """The proxy is asked for a host that does not exist."""
    with LocalIndex(R13) as proxy:
        proxy.faults["^http://mirror.invalid/simple/torch/$"] = lambda request: send(
            request, 200, html_page([R13]), "text/html")
        settings = PipSettings(proxy=proxy.url.removesuffix("/simple"), trusted_hosts=("mirror.invalid",), timeout_s=2,
                               retries=0)
        timeline, result = synced(tmp_path, [index_location("http://mirror.invalid/simple")], settings)
    assert result.added == ["2.13.0"]


@pytest.fixture
def https(tmp_path):
    """Return an index of one release behind a self-signed certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key.pem", "-out",
         tmp_path / "cert.pem", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], capture_output=True)
    assert made.returncode == 0, made.stderr

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            send(self, 200, html_page([R13]), "text/html")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"https://localhost:{server.server_port}/simple/torch/", tmp_path / "cert.pem"
    server.shutdown()
    server.server_close()


def test_a_certificate_is_trusted_only_if_pip_is_configured_so(https, monkeypatch):
    url, cert = https
    plain = PipSettings(timeout_s=3, retries=0)
    with pytest.raises(Unreachable, match="certificate that is not trusted here: `pip config set global.cert FILE`"):
        Fetcher(plain).get(url)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
    with pytest.raises(Unreachable, match="certificate that is not trusted here"):
        Fetcher(PipSettings(timeout_s=3, retries=0, cert=certifi.where())).get(url)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert HERE in Fetcher(PipSettings(timeout_s=3, retries=0, cert=str(cert))).get(url).body.decode()
    host = url.split("/")[2]
    for trusted in (host, "localhost"):
        assert HERE in Fetcher(PipSettings(timeout_s=3, retries=0, trusted_hosts=(trusted,))).get(url).body.decode()


def test_a_certificate_file_that_is_not_there_is_named():
    with pytest.raises(Unreachable, match="certificates in /nowhere.pem, which cannot be read"):
        Fetcher(PipSettings(cert="/nowhere.pem"))


@pytest.mark.parametrize("variant", ["default", "cpu"])
def test_pip_takes_the_pinned_variant_and_no_other(tmp_path, variant):
    """``torch==2.13.0`` alone would bring 2.13.0+cpu."""
    with LocalIndex(R13, Listed("2.13.0+cpu")) as index:
        timeline, _ = synced(tmp_path, [index_location(index.url)])
        pins = timeline.find("2.13.0").pins(variant)
        done = subprocess.run([sys.executable, "-m", "pip", "--isolated", "download", "--quiet", "--no-deps",
                               "--index-url", index.url,
                               "--dest", tmp_path / "got", pins.torch], capture_output=True, text=True,
                               env={"PIP_CONFIG_FILE": os.devnull})
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "got").iterdir()] == [(R13
        if variant == "default" else Listed("2.13.0+cpu")).name]
