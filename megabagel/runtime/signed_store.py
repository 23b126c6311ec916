"""What ranks tell each other through the job's store: JSON with a signature by the job's secret, never a pickle.

torch's TCPStore has no access control: whoever reaches its port can list, read, write and delete every key. A value
counts only when its HMAC-SHA256 covers the group, the key and the text: a value of another key, group or job does not
fit. So a stranger without the secret cannot end or mislead a run by a write; deleting keys or flooding the port can
still disturb it. docs/faults.md lists what stays open.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SECRET = "MEGABAGEL_JOB_SECRET"
"""Variable with the secret of a job: made by --nproc and by the sbatch scripts. An environment is readable by its user
alone; a command line is readable by all, so there is no option for it."""
_DIGITS = hashlib.sha256().digest_size * 2


def job_secret(env: Mapping[str, str] = os.environ) -> bytes:
    """The secret of this job; empty without one: then signatures only keep out what was written by accident."""
    return env.get(SECRET, "").encode()


class SignedStore:
    """Values of one group of ranks. `group` is part of what is signed, and the prefix of the keys."""

    def __init__(self, store: dist.Store, group: str = "", secret: bytes | None = None) -> None:
        self._store = dist.PrefixStore(group, store) if group else store
        self._group = group
        self._secret = job_secret() if secret is None else secret

    def set(self, key: str, value: Any) -> None:
        """Write a value, whatever was there."""
        self._store.set(key, self._signed(key, value))

    def claim(self, key: str, value: Any) -> Any:
        """Write a value where no signed one is, in one step; returns the one that stands."""
        mine = self._signed(key, value)
        found = self._store.compare_set(key, "", mine)
        if (there := self._checked(key, found)) is None:
            self._store.set(key, mine)  # over what is not the job's
            return value
        return there

    def get(self, key: str) -> Any:
        """The value of a key at once; None where it is absent or not signed by this job."""
        return self._checked(key, self._store.get(key)) if self._store.check([key]) else None

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Values of keys that exist; those that are not signed by this job are left out."""
        keys = list(keys)
        found = zip(keys, self._store.multi_get(keys) if keys else (), strict=True)
        return {key: value for key, data in found if (value := self._checked(key, data)) is not None}

    def absent(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that do not exist, asked one by one."""
        return [key for key in keys if not self._store.check([key])]

    def wait(self, keys: list[str], seconds: float) -> None:
        """Wait until all keys exist. Raises dist.DistStoreError when they do not in time."""
        self._store.wait(keys, timedelta(seconds=max(seconds, 0.001)))

    def _signed(self, key: str, value: Any) -> str:
        text = json.dumps(value)
        return self._mac(key, text.encode()) + text

    def _checked(self, key: str, data: bytes) -> Any:
        """A value whose signature fits, else None. Nothing is parsed before the signature was compared."""
        mac, text = data[:_DIGITS], data[_DIGITS:]
        if not hmac.compare_digest(mac, self._mac(key, text).encode()):
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # only without a secret
            return None

    def _mac(self, key: str, text: bytes) -> str:
        signed = b"\0".join((self._group.encode(), key.encode(), text))
        return hmac.new(self._secret, signed, hashlib.sha256).hexdigest()
