"""Upload of a folder to the Hugging Face Hub. The token is that of `hf auth login` or HF_TOKEN, and is never shown."""

from __future__ import annotations

import re
from pathlib import Path

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class UploadError(OSError):
    """The Hub did not take the folder; the message says why, in one line, and what to do."""


def check_repo(repo: str) -> None:
    """Raises UploadError unless this is `owner/name`."""
    if not REPO.fullmatch(repo) or "--" in repo or ".." in repo or len(repo) > 96:
        raise UploadError(f"--repo {repo!r:.100}: write owner/name")


def upload(folder: Path, repo: str, message: str, private: bool = False) -> str:
    """Puts all files of a folder into a model repository, in one commit; returns the commit's address.

    Args:
        repo: `owner/name`; it is created where it is not there.
        private: the repository is for its owner alone; one that is there and public is then refused.

    Raises:
        UploadError: no token, no right, no network, or the Hub refuses a file.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UploadError(f"{repo} is there and public; leave out --private, or make it private on the Hub first")
        done = api.upload_folder(repo_id=repo, folder_path=folder, repo_type="model", commit_message=message)
    except UploadError:
        raise
    except Exception as error:  # huggingface_hub and its network library have many of their own
        raise UploadError(_reason(error, repo)) from None  # its cause holds the request, with the token
    return str(done.commit_url)


def _reason(error: Exception, repo: str) -> str:
    """One line for what went wrong, and the remedy."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    known = {
        401: "no or a wrong token (401): `hf auth login`, or set HF_TOKEN",
        403: f"this token may not write to {repo} (403): ask its owner, or make a token with the right to write",
        404: f"no such owner or repository (404): look at --repo {repo}",
    }
    if isinstance(error, LocalTokenNotFoundError):
        return f"{repo} was not uploaded: {known[401]}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} was not uploaded: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
    if status in known:
        return f"{repo} was not uploaded: {known[status]}"
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    token = get_token()
    said = said.replace(token, "***") if token else said
    return f"{repo} was not uploaded: {said:.300}; what is there is as it was, and the same command tries again"
