"""Adapters on the hub: finding one file of an adapter, here or there, and uploading a folder."""

from __future__ import annotations

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download

from workbench.errors import CheckpointError

PICKLE_NAME = "adapter_model.bin"
HUB_ARGUMENTS = frozenset(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "subfolder"}


def locate(source: str | Path, name: str, subfolder: str | None = None, **kwargs: Any) -> Path:
    """The path of one file of an adapter, in a folder or, downloaded, in a hub repository.

    Args:
        kwargs: what `hf_hub_download` takes (revision, token, ...); the rest is ignored, as peft does.

    Raises:
        CheckpointError: there is no such file.
    """
    folder = Path(source, subfolder or "")
    if (folder / name).is_file():
        return folder / name
    if folder.is_dir() or os.path.isabs(source):
        raise CheckpointError(f"Can't find '{name}' at '{folder}'.{_pickle_hint(folder)}")
    arguments = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **arguments))
    except Exception as error:
        raise CheckpointError(
            f"Can't find '{name}' at '{source}': not a folder here, and the hub says: {error}"
        ) from error


def _pickle_hint(folder: Path) -> str:
    if not (folder / PICKLE_NAME).exists():
        return ""
    return f" The pickled {PICKLE_NAME} is not loaded, since it could run code: save it as safetensors first."


class PushToHub:
    """What has a `save_pretrained` can be uploaded."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save: Any,
    ) -> CommitInfo:
        """Save into a hub repository, which is made if need be, as one commit.

        Args:
            repo_id: its name, e.g. "user/name".
            private: whether a new repository is.
            revision: the branch, made if need be; default: main.
            create_pr: propose the commit instead of making it.
            save: arguments of `save_pretrained`.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save)  # type: ignore[attr-defined]
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
