# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Publishing: what of a model's folder belongs on the Hub, and sending it there in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_san import __version__
from modeling_san.auto import classes_of_type
from modeling_san.processing.wording_san import one_line
from modeling_san.training.metrics import RESULTS_FILE

from .model_card import (
    CARD_FILE,
    example_name,
    find_example,
    make_model_card,
    public_name,
    read_config,
    read_json,
    read_kept_metadata,
    weight_files,
)

_FILES = (
    *("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"),
)
"""What of a folder belongs to a model beside weights, code and card; all else stays where it is."""

_NEEDED_CLASSES = {
    "config.json": {"AutoConfig", "AutoModel"},
    "processor_config.json": {"AutoProcessor"},
    "tokenizer_config.json": set(),
}
"""Files that refer to code, and to which classes at least."""

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class PublishError(ValueError):
    """Something keeps a model from being published; the message says what, and never holds a token."""


@dataclass
class Upload:
    """What is to be published."""

    files: dict[str, Path | bytes]
    """A file on disk, or content, by its name in the repository."""
    left_out: list[str] = field(default_factory=list)
    """What the folder holds beside; folders end with a slash."""
    notes: dict[str, str] = field(default_factory=dict)
    """What is not simply the folder's own file, and why, by the name of the file."""
    has_new_card: bool = False

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    def states_license(self) -> bool:
        """Whether the card says under which licence the weights are."""
        content = self.files[CARD_FILE]
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        return bool(ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("license"))


@dataclass(frozen=True)
class Published:
    """What has been published: the repository, the commit, its own card if that was kept, the files removed."""

    url: str
    commit: str
    kept_card: bool
    removed: list[str]


def check_repo_id(repo_id: str) -> None:
    """Raise a `PublishError` for anything else than the NAMESPACE/NAME of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} cannot name a repository: {one_line(error)}") from None
    if "/" not in repo_id:
        raise PublishError(f"{repo_id!r} does not say whose repository it is: write YOUR-NAME/{repo_id}")


# What belongs to a model


@contextmanager
def prepared_upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    new_card: bool = False,
    **about: Any,
) -> Iterator[Upload]:
    """
    Choose what to publish, and make what is missing: the card, and the code of a folder that carries none.

    Args:
        folder: with a model and its processor; nothing in it is changed.
        repo_id: where it goes to.
        new_card: make a card even where the folder has a README.md.
        **about: what else `make_model_card` takes.

    Yields:
        what to publish; files that were made for it are deleted at the end of the block.

    Raises:
        ValueError: where the folder holds no model, or one of the files cannot be read.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    config = read_config(folder)
    with TemporaryDirectory(prefix="san-push-") as scratch:
        names = [*weight_files(folder), *(name for name in _FILES if (folder / name).is_file())]
        upload = Upload({name: folder / name for name in names})
        if _may_be_public(folder / RESULTS_FILE):
            upload.files[RESULTS_FILE] = folder / RESULTS_FILE
        code = _own_code(folder)
        if code is None:
            code = _write_with_code(folder, Path(scratch))
            upload.notes |= dict.fromkeys(code, f"of modeling_san {__version__}")
        upload.files |= code
        if example := find_example(folder, config):
            upload.files[example_name(example)] = example
        if (folder / CARD_FILE).is_file() and not new_card:
            read_kept_metadata(folder)
            upload.files[CARD_FILE] = folder / CARD_FILE
            upload.notes[CARD_FILE] = "the folder's own"
        else:
            made = make_model_card(folder, repo_id=repo_id, **about)
            upload.files[CARD_FILE] = str(made).encode()
            upload.notes[CARD_FILE] = "made from the folder's facts"
            upload.has_new_card = True
        upload.files = dict(sorted(upload.files.items()))
        _refuse_links_out(folder, upload)
        upload.left_out = sorted(
            path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in upload.files
        )
        yield upload


def _may_be_public(results: Path) -> bool:
    """Measurements accompany the card that quotes them, unless they tell where files lie on somebody's disk."""
    content = read_json(results) if results.is_file() else None
    return content is not None and all(
        public_name(content[key]) == str(content[key]) for key in ("model", "dataset") if content.get(key)
    )


def _own_code(folder: Path) -> dict[str, Path | bytes] | None:
    """The code that the folder's files refer to; None where some of it, or a reference, is missing."""
    files = set()
    for name, needed in _NEEDED_CLASSES.items():
        content = read_json(folder / name) if (folder / name).is_file() else {}
        auto_map, pipelines = (content.get(key) or {} for key in ("auto_map", "custom_pipelines"))
        if not isinstance(auto_map, Mapping) or not isinstance(pipelines, Mapping) or needed - set(auto_map):
            return None
        for reference in [*auto_map.values(), *(one.get("impl") for one in pipelines.values())]:
            # "repository--module.Class" stands for code that lies elsewhere
            match = re.fullmatch(r"(\w+)\.\w+", str(reference))
            if match is None or not (folder / f"{match[1]}.py").is_file():
                return None
            files.add(f"{match[1]}.py")
    try:
        files |= {Path(path).name for name in files for path in get_relative_import_files(folder / name)}
    except OSError:
        return None
    return {name: folder / name for name in files} if all((folder / name).is_file() for name in files) else None


def _write_with_code(folder: Path, scratch: Path) -> dict[str, Path | bytes]:
    """Configuration, processor and code as saving the model writes them today, without its weights."""
    config = read_config(folder)
    _, model_class, processor_class = classes_of_type(config.model_type)
    with torch.device("meta"):
        model = model_class(config)
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    model.to(dtype=dtype).save_pretrained(scratch, state_dict={})
    processor_class.from_pretrained(folder).save_pretrained(scratch)
    return {path.name: path for path in scratch.iterdir() if path.is_file() and path.suffix != ".safetensors"}


def _refuse_links_out(folder: Path, upload: Upload) -> None:
    """A link to elsewhere would publish a file that nobody sees in the folder; the Hub's cache links to its blobs."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    for content in upload.files.values():
        if isinstance(content, Path) and content.is_relative_to(folder):
            target = content.resolve()
            if not any(target.is_relative_to(place) for place in inside):
                raise ValueError(f"{content} is a link to {target}: replace it by a copy if that is to be published")


# The repository


def push(
    upload: Upload, repo_id: str, *, private: bool = False, update: bool = False, new_card: bool = False, message: str
) -> Published:
    """
    Publish in one commit, with the token that huggingface_hub keeps.

    Args:
        upload: from `prepared_upload`.
        repo_id: made if it is not there.
        private: make it private.
        message: of the commit.
        update: commit on top of what the repository holds: files of the same names are replaced, weights under other
            names removed, all else stays, a card too unless the folder brings one.
        new_card: replace the repository's card also by one that was made now.

    Raises:
        PublishError: where the network, the token, its rights or the repository's content stand against it.
    """
    check_repo_id(repo_id)
    token = find_token()
    api = HfApi(token=token)
    with _explained(repo_id, token, "nothing was published"):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            info = None
            # None leaves the choice to what the account or organisation has set
            api.create_repo(repo_id, private=private or None)
    if private and info is not None and not info.private:
        raise PublishError(
            f"{repo_id} exists and is public: make it private on its page first, or leave out --private"
        )
    present = [] if info is None else [file.rfilename for file in info.siblings or []]
    # The Hub makes repositories with one file in them
    others = [name for name in present if name != ".gitattributes"]
    if others and not update:
        raise PublishError(
            f"{repo_id} exists and holds files, {others[0]!r} for example: pass --update to commit on top of the "
            f"{len(others)}, or choose another name"
        )
    keep_card = upload.has_new_card and not new_card and CARD_FILE in present
    removed = [name for name in present if _WEIGHTS.fullmatch(name) and name not in upload.files]
    with _explained(repo_id, token, "push once more; what has arrived is not sent twice"):
        # Read at once, so that a file that is not there stops all before anything is sent
        operations: list[Any] = [
            CommitOperationAdd(name, content)
            for name, content in upload.files.items()
            if not (keep_card and name == CARD_FILE)
        ]
        commit = api.create_commit(
            repo_id,
            [*operations, *map(CommitOperationDelete, removed)],
            commit_message=message,
            # Not on top of what somebody else has committed meanwhile
            parent_commit=None if info is None else info.sha,
        )
    return Published(f"{api.endpoint}/{repo_id}", commit.oid, keep_card, removed)


def find_token() -> str:
    """The token that huggingface_hub keeps; a `PublishError` where there is none, or what is kept cannot be one."""
    token = get_token()
    if not token:
        raise PublishError("there is no token of the Hub on this machine: log in with `hf auth login` first")
    if not (token.isascii() and token.isprintable()):
        raise PublishError(
            "the token of this machine holds letters that no token has: log in anew with `hf auth login`"
        )
    return token


@contextmanager
def _explained(repo_id: str, token: str, outcome: str) -> Iterator[None]:
    """Say in one sentence what went wrong within the block, without the token and without what led to it."""
    try:
        yield
    except Exception as error:
        # The client and the libraries below it raise many kinds; some of them quote the headers that were sent
        message = _explain(error, repo_id)
        for part in re.findall(r"\w{4,}", token):
            message = message.replace(part, "***")
        raise PublishError(f"{message}; {outcome}") from None


def _explain(error: BaseException, repo_id: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "huggingface_hub is offline: unset HF_HUB_OFFLINE"
    # Errors of uploads are wrapped in further ones
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            namespace = repo_id.split("/", maxsplit=1)[0]
            reasons = {
                401: "the Hub does not know the token of this machine: log in anew with `hf auth login`",
                403: f"the token of this machine may not write to {repo_id}: log in with one that may write for "
                f"{namespace}",
                404: f"the Hub has no {repo_id}, or the token of this machine may not see it",
                409: f"{repo_id} exists already, or is being made: look at it, or choose another name",
                412: f"somebody else has changed {repo_id} meanwhile: push once more",
                413: "the Hub finds a file too large",
                429: "the Hub has had too many requests from here: wait a while",
            }
            if status >= 500:
                return f"the Hub has a problem of its own (error {status}): try again later"
            return reasons.get(status) or f"the Hub refuses this (error {status}): {one_line(error)}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read: {error.strerror}"
    for cause in causes:
        # The library that sends requests, under the names it has in different versions
        if type(cause).__module__.startswith("http"):
            return f"the Hub cannot be reached ({one_line(cause)}): check the network"
    return f"{repo_id} cannot be published: {one_line(error)}"


__all__ = ["PublishError", "Published", "Upload", "check_repo_id", "find_token", "prepared_upload", "push"]
