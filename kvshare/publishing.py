"""A checkpoint on the Hub: verified first, private unless asked, in one commit.

In: a checkpoint folder, a repository id. Out: a `Push` that lists what was uploaded, or would be.
Never: uploads a file that the manifest does not name, writes into the checkpoint, shows a token.

`upload_large_folder` would keep its state inside the folder that it uploads, and `upload_folder` may split a long upload into
several commits, between which the repository holds half a model. So the weights go up one by one with `preupload_lfs_files`,
and one `create_commit` makes all files visible together. What resumes is the Hub's storage itself: it is addressed by content,
so the same command, run again, sends only what is not there yet, and nothing has to be remembered on this side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvshare import __version__
from kvshare.checkpoint import MANIFEST
from kvshare.errors import KVShareError, UsageError
from kvshare.hub import http_errors
from kvshare.progress import Progress, silent
from kvshare.source import INDEX, read_json, weight_files
from kvshare.verification import verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

AGAIN = "run the same command again: what is on the Hub already is not sent twice"
SAID_CHARACTERS = 300  # of what a server says, in an error


@dataclass(frozen=True)
class Push:
    """What a push did or, if `dry_run`, would do: `files` are sizes in bytes by name. Of a dry run, `url` and `commit` are None
    and `private` is what was asked for.
    """

    repo: str
    revision: str | None
    private: bool
    files: dict[str, int]
    dry_run: bool
    url: str | None = None
    commit: str | None = None

    @property
    def bytes(self) -> int:
        """The size of all files together in bytes."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self) | {"bytes": self.bytes}


def push(
    checkpoint: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Push:
    """Upload a checkpoint to the Hub with the hub client's own login.

    Args:
        checkpoint: a folder that kvshare wrote; it is verified first.
        repo: a model repository `org/name`; it is made, private, if there is none.
        public: make a public repository, or push to one that is public.
        revision: a branch; it is made, from `main`, if there is none.
        dry_run: only verify, and list what would be uploaded; needs neither login nor network.
        progress: called on the way.

    Raises:
        BadCheckpointError: the checkpoint is not what kvshare wrote.
        UsageError: no login, or one that may not write there; a repository that is public without `public`, or that holds other
            weights; a conflict; the Hub cannot be reached or answers with an error.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise UsageError(
            f"{repo!r} names no repository", "a repository on the Hub is called org/name", "write your user name in front"
        )
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None and not dry_run:
        raise UsageError(
            f"there is no login to push to {repo} with", "the hub client has no token on this machine", "run `hf auth login`"
        )
    folder = Path(checkpoint)
    verify(folder)
    names = [*sorted(read_json(folder / MANIFEST)["files"]), MANIFEST]
    files = {name: (folder / name).stat().st_size for name in names}
    planned = Push(repo, revision, not public, files, dry_run)
    if dry_run:
        return planned
    # the client raises RuntimeError and ValueError for what went wrong between it and the server, too
    failures: tuple[type[Exception], ...] = (*http_errors(), OSError, RuntimeError, ValueError)
    try:
        with _hushed():
            return _upload(HfApi(token=True, library_name="kvshare", library_version=__version__), folder, planned, progress)
    except failures as error:
        raise _explained(repo, error, token) from None


def _upload(api: HfApi, folder: Path, planned: Push, progress: Progress) -> Push:
    from huggingface_hub import CommitOperationAdd

    repo, revision = planned.repo, planned.revision
    progress("uploading", 0, len(planned.files))
    url = str(api.create_repo(repo, private=planned.private, exist_ok=True))
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    found = api.model_info(repo, revision=revision)
    if planned.private and not found.private:
        raise UsageError(
            f"{repo} exists and is public",
            "a push is private unless asked otherwise",
            "pass --public, or choose another repository",
        )
    _refuse_other_weights(planned, {file.rfilename for file in found.siblings or []})
    operations = [CommitOperationAdd(name, folder / name) for name in planned.files]
    large = weight_files(folder)
    weights = [operation for operation in operations if operation.path_in_repo in large]
    for done, operation in enumerate(weights):
        api.preupload_lfs_files(repo, [operation], revision=revision, free_memory=False)
        progress("uploading", done + 1, len(planned.files))
    commit = api.create_commit(
        repo,
        operations,
        commit_message=f"Upload a checkpoint of kvshare {__version__}",
        revision=revision,
        parent_commit=found.sha,  # a commit of someone else since then is a conflict, not something to build on unseen
    )
    arrived = {file.rfilename for file in api.model_info(repo, revision=commit.oid).siblings or []}
    if missing := sorted(planned.files.keys() - arrived):
        raise UsageError(
            f"the Hub left {missing[0]} out of {repo}",
            "a .gitignore in the repository tells it to ignore such files",
            "remove it there, then " + AGAIN,
        )
    progress("uploading", len(planned.files), len(planned.files))
    return Push(repo, revision, bool(found.private), planned.files, False, url, commit.oid)


def _refuse_other_weights(planned: Push, present: set[str]) -> None:
    """Refuse a repository with weights that are not of this checkpoint: what is read there would be a mixture.

    Raises:
        UsageError: the first such file is named.
    """
    others = sorted(name for name in present - planned.files.keys() if name == INDEX or name.endswith(".safetensors"))
    if others:
        raise UsageError(
            f"{planned.repo} holds {others[0]}, which is not part of this checkpoint",
            "whoever loads the repository could read old and new weights together",
            "push to another repository or with --revision to a new branch, or delete that file there",
        )


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the client's own bars and warnings: those of its retries show addresses that anyone may upload to."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _explained(repo: str, error: Exception, token: str | None) -> KVShareError:
    """What a user reads when the Hub does not take a checkpoint: status and the server's own words, never an address or token."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, (*http_errors(), ConnectionError)):
        cause = cause.__cause__
    if not isinstance(cause, HfHubHTTPError):
        reached = not isinstance(cause, (*http_errors(), ConnectionError))
        what = f"{repo} was not pushed" if reached else f"the Hub cannot be reached to push to {repo}"
        return UsageError(what, _said(str(cause) or repr(cause), token), AGAIN)
    status = int(cause.response.status_code)
    why = _said(f"it answers with status {status}" + (f": {cause.server_message}" if cause.server_message else ""), token)
    if status == 401:
        return UsageError(f"the Hub does not accept your login for {repo}", why, "run `hf auth login` with a token that may write")
    if status == 403:
        return UsageError(f"your login may not write to {repo}", why, "use a token with write access, or a name of your own")
    if status == 404:
        return UsageError(f"the Hub does not find {repo}", why, "check the name, and that your login may see it")
    if status in (409, 412):
        return UsageError(f"{repo} was changed meanwhile", why, "look at what is there now, then " + AGAIN)
    return UsageError(f"the Hub did not take {repo}", why, AGAIN)


def _said(text: str, token: str | None) -> str:
    """The words of a server or library on one line, without the token that it may have repeated."""
    line = " ".join(text.split())
    if token:
        line = line.replace(token, "<token>")
    return re.sub(r"\bhf_\w{8,}", "<token>", line)[:SAID_CHARACTERS]
