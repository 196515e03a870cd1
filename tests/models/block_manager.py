"""The block manager as plain lists and dicts: slow, and meant to be obviously right.

It has the native manager's methods and answers as that should; sequence ids are its own. Block
tables are lists, the free queue is a list, and the cache is a list of (hash, block) in the order of
publishing, searched from its start.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.models.block_hash import hash_blocks, root


@dataclass
class ModelSequence:
    table: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_published: int = 0
    num_cached_tokens: int = 0
    root: bytes = b""
    external: bool = False
    knows_tokens: bool = False
    publishes: bool = False


class ModelBlockManager:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool,
        null_block: bool,
        watermark: float,
        algorithm: str,
        hash_key: bytes,
        max_events: int,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.first_block = 1 if null_block else 0
        self.watermark_blocks = int(watermark * num_blocks)
        self.algorithm = algorithm
        self.key = hash_key
        self.max_events = max_events
        self.free_list = list(range(self.first_block, num_blocks))
        self.cached: list[tuple[bytes, int]] = []
        self.sequences: dict[int, ModelSequence] = {}
        self.detached: Counter[int] = Counter()
        self.events: list[tuple[object, ...]] = []
        self.num_events = 0
        self.counters: Counter[str] = Counter()
        self.next_id = 0

    # Facts derived from the state above.
    @property
    def circulating(self) -> int:
        return self.num_blocks - self.first_block

    def references(self, block: int) -> int:
        return self.detached[block] + sum(s.table.count(block) for s in self.sequences.values())

    def hash_of(self, block: int) -> bytes | None:
        return next((h for h, b in self.cached if b == block), None)

    def find(self, block_hash: bytes) -> int | None:
        return next((b for h, b in self.cached if h == block_hash), None)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def hashes(self, tokens: Sequence[int], salt_root: bytes) -> list[bytes]:
        return hash_blocks(self.key, self.block_size, tokens, parent=salt_root, algorithm=self.algorithm)

    # Steps that the calls below are made of.
    def _event(self, *what: object) -> None:
        if self.max_events:
            self.events = [*self.events, (self.num_events, *what)][-self.max_events :]
            self.num_events += 1

    def _get(self, sequence: int) -> ModelSequence:
        return self.sequences[sequence]

    def _valid(self, blocks: Sequence[int]) -> None:
        if not all(self.first_block <= b < self.num_blocks for b in blocks):
            raise ValueError("bad block")

    def _fits(self, num_blocks: int, reserved: int = 0, watermark: bool = False) -> bool:
        return num_blocks + reserved + watermark * self.watermark_blocks <= len(self.free_list)

    def _no_room(self, total: int = 0) -> None:
        if total > self.circulating:
            raise ValueError("needs more blocks than exist")
        self.counters["num_failed"] += 1

    def _forget(self, block: int) -> None:
        block_hash = self.hash_of(block)
        self.cached = [(h, b) for h, b in self.cached if b != block]
        if block_hash not in [h for h, _ in self.cached]:
            self._event("removed", block_hash, b"", block, [])
        self.counters["num_evicted_blocks"] += 1

    def _take(self, count: int) -> list[int]:
        taken, self.free_list = self.free_list[:count], self.free_list[count:]
        for block in taken:
            if self.hash_of(block):
                self._forget(block)
        self.counters["num_allocated_blocks"] += count
        return taken

    def _give_back(self, blocks: Sequence[int]) -> None:
        """`blocks` have lost one reference each already, in this order."""
        gone = [b for i, b in enumerate(blocks) if self.references(b) == 0 and b not in blocks[i + 1 :]]
        first = [b for b in gone if not self.hash_of(b)]
        last = [b for b in gone if self.hash_of(b)]
        self.free_list = first + self.free_list + last

    def _publish(self, s: ModelSequence, index: int, hashes: Sequence[bytes], tokens: Sequence[int]) -> int:
        block = s.table[index]
        if self.hash_of(block):
            return 0
        is_new = self.find(hashes[index][:16]) is None
        self.cached.append((hashes[index][:16], block))
        parent = hashes[index - 1][:16] if index else b""
        if is_new:
            self._event("stored", hashes[index][:16], parent, block, list(tokens))
        return 1

    def _add_tokens(self, s: ModelSequence, tokens: Sequence[int]) -> list[int]:
        needed = max(self.blocks_for(s.num_tokens + len(tokens)) - len(s.table), 0)
        new = self._take(needed)
        s.table += new
        s.num_tokens += len(tokens)
        if s.knows_tokens:
            s.tokens += tokens
            if s.publishes:
                hashes = self.hashes(s.tokens, s.root)
                for i in range(s.num_published, len(hashes)):
                    size = self.block_size
                    self._publish(s, i, hashes, s.tokens[i * size : (i + 1) * size])
                s.num_published = len(hashes)
        return new

    # The manager's calls.
    def match_hashes(self, hashes: Sequence[bytes], max_blocks: int = -1) -> list[int]:
        found: list[int] = []
        for block_hash in hashes if max_blocks < 0 else hashes[:max_blocks]:
            block = self.find(block_hash[:16])
            if block is None or not self.prefix_cache:
                break
            found.append(block)
        return found

    def allocate(
        self,
        tokens: Sequence[int],
        *,
        salt: bytes = b"",
        num_lookahead_tokens: int = 0,
        reserved_blocks: int = 0,
        use_watermark: bool = False,
        publish: bool = True,
    ) -> int | None:
        if not tokens or num_lookahead_tokens < 0 or reserved_blocks < 0:
            raise ValueError("bad count")
        salt_root = root(self.key, salt, self.algorithm)
        hashes = self.hashes(tokens, salt_root) if self.prefix_cache else []
        matched = self.match_hashes(hashes, (len(tokens) - 1) // self.block_size)
        total = self.blocks_for(len(tokens) + num_lookahead_tokens)
        evictable = sum(b in self.free_list for b in matched)
        if total > self.circulating or not self._fits(
            total - len(matched) + evictable, reserved_blocks, use_watermark
        ):
            return self._no_room(total)
        self.free_list = [b for b in self.free_list if b not in matched]
        s = ModelSequence(table=list(matched), root=salt_root)
        s.table += self._take(total - len(matched))
        s.knows_tokens = self.prefix_cache
        s.publishes = self.prefix_cache and publish
        s.num_published = len(matched)
        s.num_cached_tokens = len(matched) * self.block_size
        self._add_tokens(s, list(tokens))
        self.counters.update(num_queries=1, num_queried_tokens=len(tokens))
        self.counters.update(num_hit_tokens=s.num_cached_tokens, num_hits=bool(matched))
        return self._register(s)

    def _register(self, s: ModelSequence) -> int:
        self.next_id += 1
        self.sequences[self.next_id] = s
        return self.next_id

    def _plan(self, s: ModelSequence, count: int) -> bool:
        total = self.blocks_for(s.num_tokens + count)
        if total > self.circulating or not self._fits(total - len(s.table)):
            self._no_room(total)
            return False
        return True

    def append(self, sequence: int, tokens: Sequence[int]) -> tuple[int, ...] | None:
        s = self._get(sequence)
        if not tokens:
            raise ValueError("no tokens")
        return tuple(self._add_tokens(s, list(tokens))) if self._plan(s, len(tokens)) else None

    def append_one(self, sequence: int, token: int) -> int | None:
        new = self.append(sequence, [token])
        return None if new is None else new[0] if new else -1

    def append_count(self, sequence: int, num_tokens: int) -> tuple[int, ...] | None:
        s = self._get(sequence)
        if num_tokens <= 0:
            raise ValueError("bad count")
        if not self._plan(s, num_tokens):
            return None
        s.knows_tokens = False
        return tuple(self._add_tokens(s, [0] * num_tokens))

    def append_batch(self, sequences: Sequence[int], tokens: Sequence[int] | None = None) -> list[int] | None:
        needed = 0
        for i, sequence in enumerate(sequences):
            s = self._get(sequence)
            if sequence in sequences[:i]:
                raise ValueError("twice in a batch")
            if not self._plan(s, 1):
                return None
            needed += self.blocks_for(s.num_tokens + 1) > len(s.table)
        if not self._fits(needed):
            return self._no_room()
        new = []
        for i, sequence in enumerate(sequences):
            if tokens is None:
                self._get(sequence).knows_tokens = False
            added = self._add_tokens(self._get(sequence), [tokens[i] if tokens is not None else 0])
            new.append(added[0] if added else -1)
        return new

    def publish(self, sequence: int, num_tokens: int) -> int:
        s = self._get(sequence)
        if s.external or not 0 <= num_tokens <= s.num_tokens:
            raise ValueError("bad publish")
        if not self.prefix_cache:
            return 0
        hashes = self.hashes(s.tokens, s.root)
        full = min(num_tokens // self.block_size, len(hashes))
        new = sum(self._publish(s, i, hashes, []) for i in range(s.num_published, full))
        s.num_published = max(s.num_published, full)
        return new

    def fork(self, sequence: int) -> tuple[int, list[tuple[int, int]]] | None:
        parent = self._get(sequence)
        full, partial = divmod(parent.num_tokens, self.block_size)
        if partial and not self.free_list:
            return self._no_room()
        child = ModelSequence(**vars(parent))
        child.tokens = list(parent.tokens)
        child.table = parent.table[:full]
        child.num_published = min(parent.num_published, full)
        copies = []
        if partial:
            child.table += self._take(1)
            copies = [(parent.table[full], child.table[full])]
        return self._register(child), copies

    def open(self) -> int:
        return self._register(ModelSequence(external=True))

    def reserve(
        self,
        sequence: int,
        num_tokens: int,
        num_publish_tokens: int = 0,
        hashes: Sequence[bytes] | None = None,
        matched: Sequence[int] | None = None,
        reserved_blocks: int = 0,
        use_watermark: bool = False,
    ) -> tuple[int, ...] | None:
        s = self._get(sequence)
        matched = list(matched or ())
        wanted = max(self.blocks_for(num_tokens) - len(s.table) - len(matched), 0)
        if num_publish_tokens:
            held = len(s.table) + len(matched) + wanted
            self._check_publish(s, num_publish_tokens, hashes or (), held, max(s.num_published, len(matched)))
        if num_tokens < 0 or reserved_blocks < 0 or (matched and s.table):
            raise ValueError("bad reserve")
        self._valid(matched)
        if any(self.hash_of(b) is None for b in matched):
            raise ValueError("not cached")
        evictable = sum(b in self.free_list for b in matched)
        if not self._fits(wanted + evictable, reserved_blocks, use_watermark):
            return self._no_room()
        if matched:
            self.free_list = [b for b in self.free_list if b not in matched]
            s.table = matched
            s.num_published = len(matched)
            s.num_cached_tokens = len(matched) * self.block_size
        new = self._take(wanted)
        s.table += new
        if s.external:
            s.num_tokens = num_tokens
        if num_publish_tokens:
            self.publish_hashes(sequence, num_publish_tokens, hashes or ())
        return tuple(new)

    def _check_publish(
        self, s: ModelSequence, num_tokens: int, hashes: Sequence[bytes], held: int, published: int
    ) -> None:
        full = num_tokens // self.block_size
        if num_tokens < 0 or full > held or not s.external:
            raise ValueError("bad publish")
        if self.prefix_cache and full > published and full > len(hashes):
            raise ValueError("too few hashes")

    def publish_hashes(self, sequence: int, num_tokens: int, hashes: Sequence[bytes]) -> int:
        s = self._get(sequence)
        self._check_publish(s, num_tokens, hashes, len(s.table), s.num_published)
        if not self.prefix_cache:
            return 0
        full = num_tokens // self.block_size
        new = sum(self._publish(s, i, hashes, []) for i in range(s.num_published, full))
        s.num_published = max(s.num_published, full)
        return new

    def free(self, sequence: int) -> None:
        s = self.sequences.pop(sequence)
        self._give_back(s.table[::-1])

    def detach(self, sequence: int) -> list[int]:
        s = self.sequences.pop(sequence)
        self.detached.update(s.table)
        return s.table

    def free_blocks(self, block_ids: Sequence[int]) -> None:
        self._valid(block_ids)
        if Counter(block_ids) - self.detached:
            raise ValueError("not detached")
        self.detached -= Counter(block_ids)
        self._give_back(list(block_ids))

    def evict(self, block_ids: Sequence[int]) -> int:
        self._valid(block_ids)
        count = 0
        for block in block_ids:
            if self.hash_of(block):
                self._forget(block)
                count += 1
        return count

    def reset(self) -> bool:
        if len(self.free_list) < self.circulating:
            return False
        self.cached = []
        self._event("cleared", b"", b"", -1, [])
        return True

    def take_events(self) -> list[tuple[object, ...]]:
        events, self.events = self.events, []
        return events
