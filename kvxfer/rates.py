"""How often something may happen: token buckets. Pure, on a clock that is given."""

from __future__ import annotations

__all__ = ["Bucket", "Buckets"]

# Names that are remembered before those that have been quiet are dropped.
_MANY = 4096


class Bucket:
    """Lets through so many a second, and as many at once after a quiet second."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s = per_s
        self._left = max(1.0, per_s)
        self._at = now

    def take(self, now: float) -> bool:
        """Say whether one more may happen at ``now``, and count it if so."""
        full = max(1.0, self._per_s)
        self._left = min(full, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def has(self, now: float) -> bool:
        """Say whether one more may happen at ``now``, and count nothing."""
        left = self._left + (now - self._at) * self._per_s
        return min(max(1.0, self._per_s), left) >= 1

    def is_full(self, now: float) -> bool:
        """Whether it has been quiet for as long as matters."""
        return self._left + (now - self._at) * self._per_s >= max(1.0, self._per_s)


class Buckets:
    """A :class:`Bucket` for each name."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._by_name: dict[str, Bucket] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def take(self, name: str, now: float) -> bool:
        """Say whether one more of this name may happen, and count it if so."""
        bucket = self._by_name.get(name)
        if bucket is None:
            if len(self._by_name) >= _MANY:
                self._forget_quiet(now)
            bucket = self._by_name[name] = Bucket(self._per_s, now)
        return bucket.take(now)

    def has(self, name: str, now: float) -> bool:
        """Say whether one more of this name may happen, and count nothing."""
        bucket = self._by_name.get(name)
        return bucket is None or bucket.has(now)

    def _forget_quiet(self, now: float) -> None:
        for name, bucket in list(self._by_name.items()):
            if bucket.is_full(now):
                del self._by_name[name]
