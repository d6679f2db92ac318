"""`san push`: the real client of the Hub against a server of our own that speaks the routes it uses."""

import base64
import contextlib
import io
import json
import re
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.commands.main import main
from modeling_san.hub_card.publish import prepared_upload

TOKEN = "hf_theTokenThatNobodyElseMaySee"
STRAY = ("optimizer.pt", "training_state.pt", "metrics.jsonl", "recipe.yaml", "notes.txt", ".env", "helper.py")
OURS_ALONE = "nobody else may have this"


class Hub(ThreadingHTTPServer):
    """
    A Hub in memory. A repository whose name is like `create-403` or `commit-500` fails with that status there.

    Attributes:
        repositories: `private` and `files` by id.
        commits: those made, in order.
        requests: method, path and authorization of all requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = {"me/public": {"private": False, "files": {".gitattributes": b""}}}
        self.commits, self.requests, self.large_files = [], [], {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.note()
        repo_id = self.path.removeprefix("/api/models/")
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            files = [{"rfilename": name} for name in repository["files"]]
            about = {"id": repo_id, "sha": "0" * 40, "private": repository["private"], "siblings": files, "tags": []}
            self.answer(200, about)

    def do_PUT(self):
        self.note()
        content = self.body()
        repo_id, oid = self.path.removeprefix("/large/").rsplit("/", 1)
        if not self.fails("upload", repo_id):
            self.server.large_files[oid] = content
            self.answer(200, {})

    def do_POST(self):
        self.note()
        body = self.body()
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/info/lfs/objects/batch"):
            place = f"{self.server.url}/large{self.path.removesuffix('.git/info/lfs/objects/batch')}"
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{place}/{one['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            self.commit(self.path.removeprefix("/api/models/").split("/commit/")[0], body)
        else:
            self.answer(404, {"error": f"unknown route {self.path}"})

    def create(self, wanted):
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if self.fails("create", repo_id):
            return
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repositories[repo_id] = {"private": private, "files": {".gitattributes": b""}}
        self.answer(200, {"url": f"{self.server.url}/{repo_id}"})

    def commit(self, repo_id, body):
        if self.fails("commit", repo_id):
            return
        header, *lines = [json.loads(line) for line in body.splitlines()]
        files = self.server.repositories[repo_id]["files"]
        written = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            else:
                files.pop(value["path"])
            written.append(value["path"])
        self.server.commits.append({"repo_id": repo_id, **header["value"], "paths": written})
        oid = f"{len(self.server.commits):040d}"
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def fails(self, stage, repo_id):
        found = re.search(rf"{stage}-(\d+|drop)$", repo_id)
        if not found:
            return False
        if found[1] == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            # A careless server that tells everybody what it was sent
            self.answer(int(found[1]), {"error": f"not with {self.headers['Authorization']}"})
        return True

    def note(self):
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status, content, headers=None):
        content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(make_model, processor, tmp_path_factory):
    """A tiny model as a training run leaves it, among things that nobody else should have."""
    path = tmp_path_factory.mktemp("trained") / "my-model"
    model = make_model()
    model.set_labels(["sky", "road"], processor)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    for name in STRAY:
        (path / name).write_text("dataset: /home/me/train.parquet\n" if name == "recipe.yaml" else OURS_ALONE)
    for name in ("checkpoints/step-00000001/model.safetensors", "logs/events", "__pycache__/modeling_san.pyc"):
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(OURS_ALONE)
    return path


@pytest.fixture(scope="module")
def sharded(folder, make_model, tmp_path_factory):
    """The same with other weights, in several files."""
    path = tmp_path_factory.mktemp("sharded") / "my-model"
    shutil.copytree(folder, path)
    (path / "model.safetensors").unlink()
    make_model(seed=1).save_pretrained(path, max_shard_size="50KB")
    return path


DONE = {
    "dry": ("me/dry", "--dry-run"),
    "private": ("me/private", "--private", "--message", "The first"),
    "open": ("me/open",),
    "update": ("me/private", "--update"),
}
"""Arguments of commands that succeed, by a name for them."""

REFUSED = {
    "me/private": "--update",
    "me/public": "is public",
    "me/create-401": "hf auth login",
    "me/create-403": "may not write to me/create-403",
    "me/create-409": "exists already",
    "me/create-429": "too many requests",
    "me/upload-503": "error 503",
    "me/upload-drop": "cannot be reached",
    "me/commit-403": "may not write to me/commit-403",
    "me/commit-412": "changed me/commit-412 meanwhile",
    "me/commit-drop": "cannot be reached",
    "me/nobody": "check the network",
    "me/offline": "HF_HUB_OFFLINE",
    "me/no-token": "hf auth login",
    "me/odd-token": "hf auth login",
    "me/my model": "'me/my model'",
    "me/my/model": "'me/my/model'",
    "my-model": "YOUR-NAME/my-model",
    "me/no-folder": "is not a folder",
    "me/no-model": "config.json",
    "me/no-message": "--message",
}
"""What is said of those that fail, by their repository."""


@pytest.fixture(scope="module")
def said(hub, folder, sharded, tmp_path_factory):
    """Exit code and output of each command, run one after the other."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    options = {"me/public": ("--private",), "me/no-message": ("--message", " ")}
    cases = DONE | {repo_id: (repo_id, *options.get(repo_id, ())) for repo_id in REFUSED}
    folders = {"update": sharded, "me/no-folder": folder / "no-such", "me/no-model": folder / "logs"}
    tokens = {"me/no-token": "", "me/odd-token": f"{TOKEN}\u00e9"}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        # The client waits before it tries again
        patch.setattr("time.sleep", lambda seconds: None)
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, arguments in cases.items():
            patch.setenv("HF_TOKEN", tokens.get(name, TOKEN))
            patch.setattr(constants, "ENDPOINT", nobody if name == "me/nobody" else hub.url)
            patch.setattr(constants, "HF_HUB_OFFLINE", name == "me/offline")
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(["push", str(folders.get(name, folder)), *arguments, "--license", "mit"])
            said[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return said


@pytest.mark.slow
def test_what_arrives_is_byte_for_byte_the_folders_model_in_one_commit(hub, said, folder):
    assert said["private"]["code"] == said["open"]["code"] == 0, said["private"]["err"]
    assert hub.repositories["me/private"]["private"]
    assert not hub.repositories["me/open"]["private"]
    [commit] = [commit for commit in hub.commits if commit["summary"] == "The first"]
    names = set(commit["paths"])
    arrived = dict(hub.repositories["me/open"]["files"])
    assert set(arrived) == names | {".gitattributes"}
    own = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in STRAY}
    assert {name: arrived[name] for name in names - {"README.md"}} == own
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_san.py"} <= names


def test_nothing_of_training_is_published(hub, said):
    assert said["open"]["code"] == 0
    everything = b"".join(hub.repositories["me/open"]["files"].values())
    assert b"train.parquet" in everything
    assert b"/home/me" not in everything
    assert OURS_ALONE.encode() not in everything
    for name in (*STRAY, "checkpoints/", "logs/"):
        assert name in said["dry"]["out"].split("left out: ")[1]


def test_an_update_replaces_weights_and_keeps_the_card(hub, said, sharded):
    assert said["update"]["code"] == 0, said["update"]["err"]
    files = hub.repositories["me/private"]["files"]
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(name for name in files if name.endswith(".safetensors")) == shards
    assert files["model.safetensors.index.json"] == (sharded / "model.safetensors.index.json").read_bytes()
    commit = [commit for commit in hub.commits if commit["repo_id"] == "me/private"][-1]
    assert "README.md" not in commit["paths"]
    assert commit["parentCommit"] == "0" * 40


def test_a_dry_run_lists_each_file_with_its_size_and_asks_nobody(hub, said, folder):
    assert said["dry"]["code"] == 0
    assert not any("dry" in path for _, path, _ in hub.requests)
    assert "me/dry" not in hub.repositories
    listed = dict(re.findall(r"^  (\S+) +([\d.]+)k?B\b", said["dry"]["out"], flags=re.MULTILINE))
    size = (folder / "model.safetensors").stat().st_size / 1e3
    assert float(listed["model.safetensors"]) == pytest.approx(size, rel=0.01)
    published = set(hub.repositories["me/open"]["files"]) - {".gitattributes"}
    assert set(listed) == published
    assert re.search(rf"^  {len(published)} files +[\d.]+kB", said["dry"]["out"], flags=re.MULTILINE)


@pytest.mark.parametrize("repo_id", REFUSED)
def test_what_goes_wrong_is_said_in_one_line(said, repo_id):
    run = said[repo_id]
    lines = [line for line in run["err"].splitlines() if "san:" in line or "Error" in line or "Traceback" in line]
    assert (run["code"], len(lines)) == (2, 1), run["err"]
    assert REFUSED[repo_id] in lines[0]


def test_what_a_repository_holds_is_changed_only_by_an_update_and_a_public_one_by_nothing_private(hub, said):
    # The first, and the update, but not what came again
    assert [commit["repo_id"] for commit in hub.commits].count("me/private") == 2
    assert list(hub.repositories["me/public"]["files"]) == [".gitattributes"]


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, said):
    everything = "".join(run["out"] + run["err"] for run in said.values())
    assert any(authorization == f"Bearer {TOKEN}" for _, _, authorization in hub.requests)
    assert TOKEN[:20] not in everything
    assert "Traceback" not in everything


@pytest.fixture
def model_copy(folder, tmp_path):
    """A copy of the model to change."""
    return shutil.copytree(folder, tmp_path / "model")


def test_a_folder_without_code_gets_that_of_a_folder_saved_today_and_gives_the_same(folder, tmp_path):
    assert not list(BUILTIN_MODEL.glob("*.py"))
    with prepared_upload(BUILTIN_MODEL, "me/my-san") as upload:
        for name, content in upload.files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    saved = {path.name: path.read_bytes() for path in folder.glob("*.py") if path.name not in STRAY}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.py")} == saved
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        ours, theirs = (json.loads((place / name).read_text()) for place in (tmp_path, folder))
        assert ours.get("auto_map") == theirs.get("auto_map")
        assert ours.get("custom_pipelines") == theirs.get("custom_pipelines")
    for name in ("model.safetensors", "README.md", "results.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (BUILTIN_MODEL / name).read_bytes()
    pixels = torch.rand(3, 120, 90, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    answers = []
    for place in (BUILTIN_MODEL, tmp_path):
        model = SANForOpenVocabSegmentation.from_pretrained(place).eval()
        inputs = SANProcessor.from_pretrained(place)(images=pixels, text=["grass", "red plain"], return_tensors="pt")
        with torch.no_grad():
            answers.append(model(**inputs))
    assert torch.equal(answers[0].masks_queries_logits, answers[1].masks_queries_logits)
    assert torch.equal(answers[0].class_queries_logits, answers[1].class_queries_logits)


def test_code_that_lies_in_another_repository_is_replaced_by_our_own(model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["auto_map"] = {name: f"somebody/else--{value}" for name, value in config["auto_map"].items()}
    (model_copy / "config.json").write_text(json.dumps(config))
    with prepared_upload(model_copy, "me/my-model") as upload:
        content = upload.files["config.json"].read_text()
    assert "somebody" not in content
    assert "modeling_san.SANForOpenVocabSegmentation" in content


def test_results_that_name_files_on_a_disk_stay_there(model_copy):
    results = {
        **dict.fromkeys(("mean_iou", "mean_accuracy", "overall_accuracy", "frequency_weighted_iou"), 0.5),
        **{"images": 3, "unlabelled_images": 0, "subsets": {}, "per_class_iou": {}, "per_class_accuracy": {}},
        **{"model": "my-model", "dataset": "/home/me/val.parquet"},
    }
    (model_copy / "results.json").write_text(json.dumps(results))
    with prepared_upload(model_copy, "me/my-model") as upload:
        assert "results.json" not in upload.files
        assert b"val.parquet" in upload.files["README.md"]
        assert b"/home/me" not in upload.files["README.md"]


def link_out(folder):
    (folder / "NOTICE").symlink_to(folder.parent / "secret.safetensors")


def index_out(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("reach_out", [link_out, index_out])
def test_nothing_outside_of_the_folder_is_published(model_copy, reach_out):
    (model_copy.parent / "secret.safetensors").write_text("secret")
    reach_out(model_copy)
    with pytest.raises(ValueError, match=r"secret\.safetensors"), prepared_upload(model_copy, "me/my-model"):
        pass


def test_a_card_that_cannot_be_read_is_refused_before_anything_is_sent(model_copy, capsys):
    (model_copy / "README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    assert main(["push", str(model_copy), "me/my-model", "--dry-run"]) == 2
    assert "README.md" in capsys.readouterr().err
