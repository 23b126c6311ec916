"""Signed values in the job's store: JSON with an HMAC by the job's secret, never a pickle.

torch's TCPStore has no access control: whoever reaches its port can list, read, write and delete every key. A value
counts only if its HMAC-SHA256 covers group, key and text, so a value of another key, group or job is not accepted. A
stranger without the secret cannot end or mislead a run by writing; deleting keys or flooding the port can still disturb
it (docs/faults.md#who-may-reach-the-store).
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
"""Variable with the job's secret, set by --nproc and the sbatch scripts. There is no option for it: an environment
is readable by its user alone, a command line by all users of a host."""
_DIGITS = hashlib.sha256().digest_size * 2


def job_secret(env: Mapping[str, str] = os.environ) -> bytes:
    """Return the secret of this job. Without one it is empty, and signatures only reject accidental writes."""
    return env.get(SECRET, "").encode()


class SignedStore:
    """Values of one group of ranks; `group` is part of the signature and prefix of the keys."""

    def __init__(self, store: dist.Store, group: str = "", secret: bytes | None = None) -> None:
        self._store = dist.PrefixStore(group, store) if group else store
        self._group = group
        self._secret = job_secret() if secret is None else secret

    def set(self, key: str, value: Any) -> None:
        """Write a value, overwriting any."""
        self._store.set(key, self._signed(key, value))

    def claim(self, key: str, value: Any) -> Any:
        """Write a value atomically unless a signed one exists; returns the one that is stored."""
        mine = self._signed(key, value)
        found = self._store.compare_set(key, "", mine)
        if (there := self._checked(key, found)) is None:
            self._store.set(key, mine)  # over what is not the job's
            return value
        return there

    def get(self, key: str) -> Any:
        """Return a value without waiting; None if it is absent or not signed by this job."""
        return self._checked(key, self._store.get(key)) if self._store.check([key]) else None

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values of existing keys; values not signed by this job are left out."""
        keys = list(keys)
        found = zip(keys, self._store.multi_get(keys) if keys else (), strict=True)
        return {key: value for key, data in found if (value := self._checked(key, data)) is not None}

    def absent(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that do not exist, checked one by one."""
        return [key for key in keys if not self._store.check([key])]

    def wait(self, keys: list[str], seconds: float) -> None:
        """Wait until all keys exist. Raises dist.DistStoreError after `seconds`."""
        self._store.wait(keys, timedelta(seconds=max(seconds, 0.001)))

    def _signed(self, key: str, value: Any) -> str:
        text = json.dumps(value)
        return self._mac(key, text.encode()) + text

    def _checked(self, key: str, data: bytes) -> Any:
        """Return a value if its signature is valid, else None. Nothing is parsed before the signature is compared."""
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
