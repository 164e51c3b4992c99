"""A result put on the hub, once it has its name here; that it can be is found out before the run."""

import glob
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from slimlm.checkpoint.kin import KIN
from slimlm.errors import RunFailure, UserError, one_line

# What an earlier upload left there would be read beside what is new: one file before an index, an adapter, a template.
READ = ("*.safetensors", "*.index.json", "*.bin", "adapter_config.json", "chat_template*", "*token*", "modeling_*.py")


@dataclass(frozen=True)
class Push:
    """Where a result goes on the hub. repo: `name` or `owner/name`."""

    repo: str
    private: bool = False
    token: str | None = field(default=None, repr=False)

    def check(self) -> None:
        """Raises UserError when nobody is logged in, or who is may not write there."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo)
            user = HfApi(token=self.token).whoami()
        except HFValidationError as error:
            raise UserError(f"--push-to-hub {self.repo}: {one_line(error)}") from error
        except LocalTokenNotFoundError as error:
            raise UserError(
                "--push-to-hub needs a token that may write: log in with `hf auth login`, or give --token"
            ) from error
        except Exception as error:  # the hub client lets its HTTP library's own errors through
            raise UserError(
                f"--push-to-hub: the hub does not answer as it should ({type(error).__name__}: {one_line(error)})"
            ) from error
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError("--push-to-hub: the token may only read: make one that may write at hf.co/settings/tokens")
        owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
        owner, slash, _ = self.repo.rpartition("/")
        if slash and owner not in owners:
            raise UserError(f"--push-to-hub {self.repo}: {user['name']} is not a member of {owner}")

    def upload(self, directory: Path) -> str:
        """Upload a result, instead of a model that is there; where it is then. Raises RunFailure."""
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        try:
            where = api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            there = [name for name in api.list_repo_files(where.repo_id) if "/" not in name or name == KIN.as_posix()]
            stale = [name for name in there if any(fnmatch(name, pattern) for pattern in READ)]
            api.upload_folder(
                repo_id=where.repo_id,
                folder_path=directory,
                commit_message="slimlm",
                delete_patterns=[glob.escape(name) for name in stale],
            )
        except Exception as error:
            raise RunFailure(
                f"the result is whole, at {directory}, but uploading it failed ({type(error).__name__}: "
                f"{one_line(error)}): try again with `hf upload {self.repo} {directory}`"
            ) from error
        return str(where)
