"""Types of the extension module `twinjet._core`; twinjet.sampling documents the sampler's face."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from twinjet.engines.base import Outlet

__version__: str

# --- KV cache: block manager ---------------------------------------------------------------------

# Token ids: a list or tuple of ints, or a contiguous one-dimensional buffer of int32, uint32 or
# int64 (a numpy array, array.array, memoryview). Each id is in 0..2**31-1.
TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.int32] | npt.NDArray[np.int64]

# Block hashes, first block first: a list or tuple of bytes objects of at least 16 bytes each (the
# first 16 count), or one bytes object that holds 16 bytes a block.
BlockHashes: TypeAlias = Sequence[bytes] | bytes

class BlockHasher:
    """Chained, keyed 128-bit block hashes of token ids. Immutable, so any thread may use it.

    hash(i) = first 16 bytes of F(key, tokens of block i || hash(i - 1)), where hash(-1), the root,
    is F(key, salt). F is SHA-256 with the key as its first block, or SipHash-2-4-128.
    """

    def __init__(
        self,
        block_size: int,
        *,
        algorithm: Literal["sha256", "siphash"] = "sha256",
        key: bytes | None = None,
    ) -> None:
        """Make a hasher.

        block_size: tokens a block, a power of two in 1..65536.
        algorithm: "sha256" (default) or "siphash" (faster where the CPU lacks SHA instructions;
            for a server with a single tenant).
        key: 32 secret bytes; None draws them from the operating system.
        Raises ValueError on any value outside these ranges.
        """

    @property
    def block_size(self) -> int: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def implementation(self) -> str:
        """What computes it on this machine: "sha256-shani", "sha256-portable" or "siphash-2-4-128"."""

    def root(self, salt: bytes = b"") -> bytes:
        """Return the 16-byte parent of a first block under `salt` (any bytes: tenant, adapter, ...)."""

    def hash_blocks(
        self,
        tokens: TokenIds,
        *,
        salt: bytes = b"",
        parent: bytes | None = None,
        extra_keys: Mapping[int, bytes] | None = None,
        start: int = 0,
    ) -> list[bytes]:
        """Hash each full block of `tokens[start:]`; a partial tail is left out. 16 bytes a block.

        salt: enters the first block and so, by the chain, all blocks. Ignored when parent is given.
        parent: hash of the block before `start`, to go on with a longer sequence.
        extra_keys: further bytes for single blocks, by block index counted from `start`; each also
            reaches every later block.
        start: index of the first token to hash, a multiple of block_size.
        Raises TypeError on a wrong kind of input, ValueError on a token id, start, parent or index
        out of range. Releases the GIL while it hashes.
        """

    def hash_bytes(
        self,
        tokens: TokenIds,
        *,
        salt: bytes = b"",
        parent: bytes | None = None,
        extra_keys: Mapping[int, bytes] | None = None,
        start: int = 0,
    ) -> bytes:
        """As hash_blocks, but one bytes object of 16 bytes a block (cheaper for long prompts)."""

class PrefixMatch:
    """What the prefix cache holds of a prompt at the time of the call. Holds no references."""

    @property
    def num_tokens(self) -> int:
        """Tokens matched: a multiple of the block size."""
    @property
    def block_ids(self) -> list[int]: ...
    @property
    def hashes(self) -> bytes:
        """Hashes of all full blocks of the prompt, 16 bytes each; allocate() takes them."""

class KvEvent:
    """One change of the prefix cache, for routers that follow what this process holds."""

    @property
    def kind(self) -> Literal["stored", "removed", "cleared"]: ...
    @property
    def sequence_number(self) -> int:
        """Counts events from 0; a gap tells that the bounded log dropped some."""
    @property
    def block_hash(self) -> bytes:
        """16 bytes; empty for "cleared"."""
    @property
    def parent_hash(self) -> bytes:
        """Of a "stored" block that is not a first one: 16 bytes. Else empty."""
    @property
    def block_id(self) -> int:
        """-1 for "cleared"."""
    @property
    def tokens(self) -> list[int]:
        """The block's token ids for "stored", where the manager knows them. Else empty."""

class KvStats:
    """Counters since the manager was made or reset_stats() was called."""

    num_queries: int
    """Prompts looked up by allocate() (match() alone does not count)."""
    num_queried_tokens: int
    num_hit_tokens: int
    num_hits: int
    """Lookups that matched at least one block."""
    num_allocated_blocks: int
    num_evicted_blocks: int
    """Cached blocks that lost their contents to a new allocation or to evict()."""
    num_failed: int
    """Calls answered None for lack of free blocks."""
    num_dropped_events: int

class BlockTable:
    """A sequence's block table, logical block index -> block id. Read-only; no copy is made.

    Supports len(), indexing, iteration and the buffer protocol (int32, one dimension). All of them
    raise KeyError once the sequence is freed. An array made from it earlier stays readable: it keeps
    the memory alive, frozen at the table's last state when the sequence is freed or the table moves
    to grow, so take a new one each step.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def numpy(self) -> npt.NDArray[np.int32]:
        """Return a read-only int32 view [num_blocks of the sequence]."""
    @property
    def sequence(self) -> int: ...

class BlockManager:
    """Paged KV-cache accounting: which sequence holds which block, and what the cache remembers.

    Not a store of keys and values: it deals in block ids 0..num_blocks-1. One thread at a time (the
    GIL sees to that). Each call either does all it says or changes nothing: where blocks run short
    it returns None, where an argument is wrong it raises.

    A sequence is named by an int, unique for the life of the manager: a freed one is never found
    again. There are two ways to fill one:
    - with token ids: allocate() and append(); the manager hashes blocks and publishes full ones;
    - without: open() and reserve(); the caller supplies hashes, if any, to publish by.

    Raises, in every method that takes such an argument: KeyError for an unknown or freed sequence,
    ValueError for a value out of range, TypeError for a wrong type.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        null_block: bool = False,
        watermark: float = 0.0,
        algorithm: Literal["sha256", "siphash"] = "sha256",
        hash_key: bytes | None = None,
        max_events: int = 0,
    ) -> None:
        """Make a manager of `num_blocks` free blocks.

        num_blocks: 1..2**30 (at least 2 with null_block).
        block_size: tokens a block, a power of two in 1..65536.
        null_block: keep block 0 out of circulation, as engines do that pad tables with it.
        watermark: share of num_blocks, 0 <= w < 1, that calls with use_watermark leave free.
        hash_key: 32 bytes; None draws them from the operating system.
        max_events: length of the event log; 0 keeps none. The oldest events are dropped when full.
        """

    # Sizes.
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def prefix_cache(self) -> bool: ...
    @property
    def null_block_id(self) -> int | None: ...
    @property
    def watermark_blocks(self) -> int: ...
    @property
    def hasher(self) -> BlockHasher: ...

    # Usage.
    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence references, cached ones included."""
    @property
    def num_used_blocks(self) -> int:
        """Blocks referenced by sequences or detached holders; the null block not counted."""
    @property
    def num_cached_blocks(self) -> int:
        """Blocks, free or referenced, that the prefix cache can find."""
    @property
    def usage(self) -> float:
        """num_used_blocks / blocks in circulation, 0..1."""
    @property
    def num_sequences(self) -> int: ...
    @property
    def memory_bytes(self) -> int:
        """Bytes this manager holds on the heap, block tables included."""

    # Look-up.
    def match(self, tokens: TokenIds, *, salt: bytes = b"", max_tokens: int | None = None) -> PrefixMatch:
        """Find the longest cached prefix of full blocks, at most max_tokens long.

        max_tokens: None means len(tokens) - 1, because an engine must compute at least one token.
        Releases the GIL while it hashes.
        """
    def match_hashes(self, hashes: BlockHashes, max_blocks: int = -1, /) -> list[int]:
        """Find the block ids of the longest cached prefix, given hashes; -1 means all of them."""

    # Sequences with token ids.
    def allocate(
        self,
        tokens: TokenIds,
        *,
        salt: bytes = b"",
        hashes: bytes | None = None,
        num_lookahead_tokens: int = 0,
        reserved_blocks: int = 0,
        use_watermark: bool = False,
        publish: bool = True,
    ) -> int | None:
        """Make a sequence of `tokens` on top of what the cache holds; None where it does not fit.

        tokens: at least one. The hit is capped at len(tokens) - 1.
        hashes: PrefixMatch.hashes of the same tokens and salt, to spare hashing them again.
        num_lookahead_tokens: further token slots to hold.
        reserved_blocks: free blocks that must be left over. use_watermark: and the watermark too.
        publish: put the full blocks into the prefix cache at once. With False, publish() does, when
            they are computed.
        Raises ValueError where it needs more blocks than exist.
        """
    def append(self, sequence: int, tokens: TokenIds, /) -> tuple[int, ...] | None:
        """Append token ids to one sequence. Returns the new block ids, or None where they do not fit.

        Full blocks are published if allocate() was told so. Slots held by look-ahead are used first.
        """
    def append_one(self, sequence: int, token: int, /) -> int | None:
        """Append one token id. Returns the new block id, -1 if none was needed, None if none is free."""
    def append_count(self, sequence: int, num_tokens: int, /) -> tuple[int, ...] | None:
        """Append tokens whose ids are unknown; no block from here on is published by the manager."""
    def append_batch(
        self,
        sequences: Sequence[int] | npt.NDArray[np.int64],
        tokens: TokenIds | None = None,
        /,
    ) -> npt.NDArray[np.int32] | None:
        """Append one token to each of many distinct sequences: all of them, or None and none.

        tokens: one id a sequence; None where they are unknown (see append_count).
        Returns int32 [len(sequences)]: the new block id of each, -1 where none was needed.
        """
    def publish(self, sequence: int, num_tokens: int, /) -> int:
        """Publish the full blocks within the first num_tokens tokens; returns how many are new."""
    def fork(self, sequence: int, /) -> tuple[int, list[tuple[int, int]]] | None:
        """Make a second sequence with the same tokens; None where it does not fit.

        Full blocks are shared. A partial last block gets a copy of its own: returned beside the new
        sequence are the copies to make, (source, destination) block ids, before the next write to
        either. Look-ahead slots are not inherited.
        """

    # Sequences without token ids, for engines that keep tokens and hashes themselves.
    def open(self) -> int:
        """Make an empty sequence."""
    def reserve(
        self,
        sequence: int,
        num_tokens: int,
        num_publish_tokens: int = 0,
        hashes: BlockHashes | None = None,
        matched: Sequence[int] | None = None,
        reserved_blocks: int = 0,
        use_watermark: bool = False,
        tokens: list[int] | None = None,
        /,
    ) -> tuple[int, ...] | None:
        """See that the sequence has slots for num_tokens tokens in all. Positional arguments only.

        num_publish_tokens: then publish the full blocks within the first so many tokens, block i
            under hashes[i]; blocks published or matched before are passed over.
        matched: block ids from match_hashes, for a sequence that has no blocks yet; they come first.
        tokens: all token ids of the sequence, for the event log; read only where blocks are published.
        Returns the new block ids (matched ones not among them; () if none), or None where the free
        blocks do not suffice. Slots are never given back by a smaller num_tokens.
        Raises ValueError where a matched block is no longer cached, or hashes are too few.
        """
    def publish_hashes(
        self, sequence: int, num_tokens: int, hashes: BlockHashes, tokens: list[int] | None = None, /
    ) -> int:
        """Publish the full blocks within the first num_tokens tokens, block i under hashes[i]. tokens: as reserve().

        Returns how many the cache did not know.
        """

    # The end of a sequence.
    def free(self, sequence: int, /) -> None:
        """Drop the sequence and its references, last block first.

        A block nobody references any more is free: unpublished ones are reused first, published ones
        last, so a prompt's head outlives its tail in the cache.
        """
    def detach(self, sequence: int, /) -> list[int]:
        """Drop the sequence but keep its references; returns its block ids for free_blocks() later."""
    def free_blocks(self, block_ids: Sequence[int], /) -> None:
        """Give back detached references, in the order given (so pass a detached table reversed)."""

    # Cache upkeep.
    def evict(self, block_ids: Sequence[int], /) -> int:
        """Make the cache forget these blocks, referenced or not; returns how many it knew."""
    def reset(self) -> bool:
        """Make the cache forget everything; False, and nothing done, while any block is in use."""

    # Inspection.
    def block_table(self, sequence: int, /) -> BlockTable: ...
    def block_ids(self, sequence: int, /) -> list[int]:
        """Copy of the block table."""
    def num_tokens(self, sequence: int, /) -> int:
        """Tokens appended, or for an open() sequence those last reserved."""
    def num_cached_tokens(self, sequence: int, /) -> int:
        """Tokens of the prefix-cache hit the sequence began with."""
    def num_published_blocks(self, sequence: int, /) -> int:
        """Leading blocks of the sequence that were matched or published."""
    def blocks_needed(self, num_tokens: int, num_matched_blocks: int = 0, /) -> int:
        """Blocks that num_tokens tokens take beyond the matched ones."""
    def count_free(self, block_ids: Sequence[int], /) -> int:
        """How many of these blocks nobody references: adopting them takes so many free blocks."""
    def reference_count(self, block_id: int, /) -> int: ...
    def block_hash(self, block_id: int, /) -> bytes | None:
        """The hash a block is cached under, 16 bytes; None if it is not."""
    def free_order(self) -> list[int]:
        """Free block ids in the order they will be handed out. O(free); for tests and tools."""
    def check(self) -> None:
        """Verify every invariant, O(blocks). Raises RuntimeError naming the first that fails."""

    # Statistics and events.
    def stats(self) -> KvStats: ...
    def reset_stats(self) -> None: ...
    def take_events(self) -> list[KvEvent]:
        """Return the events since the last call, oldest first, and clear the log."""
    def drain_events(self, max_events: int) -> bytes:
        """Take up to max_events of the oldest events out of the log, as records (csrc/kv/event_log.h)."""
    def set_tag(self, sequence: int, tag: int) -> None:
        """Have a number told with the events of blocks that the sequence stores; 0 to 2^32 - 1, at first 0."""

# ---- sampler ----

SAMPLER_SPEC_VERSION: int
SAMPLER_RANGES: dict[str, tuple[float, float]]  # by parameter, both ends allowed
SAMPLER_STATUS_NAN: int
SAMPLER_STATUS_INFINITE: int
SAMPLER_STATUS_NO_TOKEN: int

def sampler_cpu_target() -> str: ...
def sampler_cpu_targets() -> list[str]: ...
def sampler_weights(
    row: npt.NDArray[np.float32], temperature: float, target: str = ""
) -> npt.NDArray[np.uint64]: ...
def sampler_exponential(seed: int, position: int, output_index: int, index: int) -> float: ...
def sampler_ln(x: float) -> float: ...

class TokenTexts:
    def __init__(self, vocabulary: Vocabulary) -> None: ...
    @staticmethod
    def load(saved: bytes) -> TokenTexts: ...
    def save(self) -> bytes: ...
    def __len__(self) -> int: ...

class BadText:
    def __init__(self, texts: TokenTexts, words: Sequence[str], *, skips_special: bool = True) -> None: ...

class SamplerRequest:
    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int = 0,
        output_index: int = 0,
        position_offset: int | None = None,
        prompt_token_ids: Sequence[int] | npt.NDArray[Any] = (),
        output_token_ids: Sequence[int] | npt.NDArray[Any] = (),
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Sequence[int] | npt.NDArray[Any] | None = None,
        bad_words: Sequence[Sequence[int]] | None = None,
        bad_text: BadText | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] | npt.NDArray[Any] = (),
    ) -> None: ...
    def append(self, token_id: int) -> None: ...
    def truncate(self, num_output_tokens: int) -> None: ...
    def banned_token_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def has_bad_text(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def output_index(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def output_token_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def is_greedy(self) -> bool: ...

HAS_CUDA: bool
CUDA_MAX_LOGPROBS: int  # only where HAS_CUDA

class CudaSampler:  # only where HAS_CUDA
    def __init__(self, device: int, num_slots: int = 4) -> None: ...
    @property
    def device(self) -> int: ...
    def reserve(self, num_rows: int, vocab_size: int, num_edits: int, num_allowed_rows: int) -> None: ...
    def prepare(
        self,
        requests: Sequence[SamplerRequest],
        vocab_size: int,
        bitmask_rows: npt.NDArray[np.int32] | None,
        stream: int,
    ) -> None: ...
    def launch(
        self,
        logits: object,
        dtype: str,
        bitmask: object | None,
        token_ids: object,
        status: object,
        processed_logits: object | None,
        num_logprobs: int,
        processed_logprobs: bool,
        top_ids: object | None,
        top_logprobs: object | None,
        ranks: object | None,
        stream: int,
    ) -> None: ...

class SeatReceipt:  # only where HAS_CUDA
    # The statuses of one draw, uint32 [rows]; once, from any thread. Waits for the draw if it is not over.
    def read(self) -> npt.NDArray[np.uint32]: ...

class SeatSampler:  # only where HAS_CUDA
    # Draws for requests that keep their state on the device; see csrc/sampler/cuda/seat_sampler.h.
    # Addresses are of device memory that stays until the draw is over; 0 where a result is not wanted.
    def __init__(self, device: int, vocab_size: int, max_rows: int) -> None: ...
    def put(self, seat: int, request: SamplerRequest) -> None: ...
    def remove(self, seat: int) -> None: ...
    def num_outputs(self, seat: int) -> int: ...
    # The first row whose seat is empty, -1 if none is.
    def first_empty(self, seats: npt.NDArray[np.int64]) -> int: ...
    # Seats by request id (-1: none), and the rows without a seat or with another number of output tokens
    # than the list output_token_ids of their state has.
    def match(
        self, request_ids: list[str], states: dict[str, object], seats: dict[str, int]
    ) -> tuple[npt.NDArray[np.int64], list[int]]: ...
    # advances: rows whose token becomes part of the output. dtype: 0 float32, 1 float16, 2 bfloat16.
    # mask_rows: the row of `masks`, mask_stride words apart, that holds for each row, -1 for none.
    def draw(
        self,
        seats: npt.NDArray[np.int64],
        advances: npt.NDArray[np.bool_],
        logits: int,
        row_stride: int,
        dtype: int,
        mask_rows: npt.NDArray[np.int32] | None,
        masks: int,
        mask_stride: int,
        token_ids: int,
        status: int,
        tokens64: int,
        tokens32: int,
        num_sampled: int,
        num_rejected: int,
        num_logprobs: int,
        processed_logprobs: bool,
        top_ids: int,
        top_logprobs: int,
        ranks: int,
        stream: int,
    ) -> SeatReceipt: ...
    # Enters tokens that another sampler drew; seat -1: a row without one. bits: 32 or 64.
    def follow(
        self,
        seats: npt.NDArray[np.int64],
        advances: npt.NDArray[np.bool_],
        tokens: int,
        stride: int,
        bits: int,
        stream: int,
    ) -> None: ...
    # Writes -inf over what the rows' bad words rule out; for a batch that another sampler draws.
    def mask(
        self, seats: npt.NDArray[np.int64], logits: int, row_stride: int, dtype: int, stream: int
    ) -> None: ...
    # How often the host had to wait for the device: "buffers", "memory", "results".
    def waits(self) -> dict[str, int]: ...

class Sampler:
    def __init__(self, num_threads: int = 0, target: str = "") -> None: ...
    def sample(
        self,
        logits: object,
        dtype: str,
        requests: Sequence[SamplerRequest],
        bitmask: object | None,
        bitmask_rows: npt.NDArray[np.int32] | None,
        advance: bool | npt.NDArray[np.bool_],
        num_logprobs: int,
        processed_logprobs: bool,
        processed_logits: npt.NDArray[np.float32] | None,
    ) -> tuple[
        npt.NDArray[np.int32],
        npt.NDArray[np.uint32],
        npt.NDArray[np.int32] | None,
        npt.NDArray[np.float32] | None,
        npt.NDArray[np.int32] | None,
    ]: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def target(self) -> str: ...

# --- Streams: tokens to text ------------------------------------------------------------------------

class Vocabulary:
    """What each token of a model says, and how tokens join to text. Immutable, thread-safe.

    Unknown ids give no text.
    """

    def __init__(
        self,
        joining: Literal["byte_level", "byte_fallback", "metaspace"],
        tokens: Sequence[str | None],
        *,
        special: Sequence[int],
        mark: str = "",
        strip_left: int = 0,
    ) -> None:
        """tokens: by id, as the tokenizer spells them. special: ids of tokens left out of text unless asked
        for. mark: what stands for a space. strip_left: spaces cut from a text's beginning. Raises ValueError."""

    @staticmethod
    def of_function(
        num_tokens: int, decode: Callable[[list[int], bool], str], *, special: Sequence[int]
    ) -> Vocabulary:
        """Ask decode(token ids, skip special tokens) for every text; what it raises comes through."""

    @property
    def is_native(self) -> bool: ...
    def __len__(self) -> int: ...
    def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of all ids at once; parts of characters show as U+FFFD."""

    def token_text(self, token_id: int) -> str:
        """Text of a token alone, special or not; a part of a character shows as U+FFFD."""

class Output:
    """One output of a request: tokens in, text out, and why it ended."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] = (),
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        max_tokens: int = ...,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        """min_tokens: up to so many, neither a token nor a stop string ends the output. include_stop: keep the
        text of what ended it. Raises ValueError for an empty stop string."""

    def take(
        self,
        token_ids: Sequence[int],
        finish: Literal["stop", "length"] | str | None = None,
        stopped_by: int | str | None = None,
    ) -> tuple[int, str]:
        """Take tokens up to the one that ends the output; give how many those are, and what text is certain.

        finish, stopped_by: the engine's word, which counts where the output has not ended earlier.
        Raises ValueError for another finish.
        """

    @property
    def ending(self) -> tuple[Literal["stop", "length"], int | str | None, bool] | None:
        """Reason, token or string that ended the output, and whether it is an end token; None: not ended."""

    @property
    def num_tokens(self) -> int: ...

class Stream:
    """One request on its way to its client: tokens go in through a Pump, GenerateResponse bytes come out.

    What is not taken is merged, one unsent delta an output. Times are seconds of the caller's clock.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        num_outputs: int,
        stop: Sequence[str],
        eos_token_ids: Sequence[int],
        stop_token_ids: Sequence[int],
        min_tokens: int,
        max_tokens: int,
        include_stop: bool,
        skip_special: bool,
        request_id: str = "",
        model: str = "",
        engine: str = "",
        deployment: str = "",
        sampler: str = "",
        num_prompt_tokens: int = 0,
        seed: int = 0,
        arrived_at: float = 0.0,
        max_pending_bytes: int = ...,
    ) -> None:
        """The first arguments as Output's. max_pending_bytes: of unsent tokens. Raises ValueError."""

    def put_queued(self, position: int, expected_wait_s: float | None) -> bool:
        """Tell the place in the queue; replaces one that is not taken. True if an empty take() waits for it."""

    def set_dispatched(self, queue_position: int, at: float) -> None: ...
    def take(self) -> list[bytes]:
        """Give the messages that are ready; after an empty answer the next step reports AWAITED."""

    def put_handoff(self, state: bytes, now: float) -> bool:
        """End the request with a handoff instead of outputs. Returns whether an empty take() had been waiting."""

    def read_deltas(self) -> None:
        """Be read by take_prompt() and take_deltas(), not by take(). Call before the first step."""

    def take_prompt(self) -> tuple[int | None, list[tuple[list[int], list[float], int]] | None] | None:
        """Give, once, what the engine told of the prompt: cached tokens, and log probabilities if asked for."""

    def take_deltas(
        self,
    ) -> list[
        tuple[
            int,
            str,
            list[int],
            list[tuple[list[int], list[float], int]],
            tuple[Literal["stop", "length"], int | str | None, bool] | None,
        ]
    ]:
        """Give output index, text, token ids, log probabilities and ending of what is not taken yet."""

    def drop(self) -> None:
        """Forget what is not taken, and keep nothing any more."""

    def summary(self) -> bytes:
        """The stream's last message."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def max_pending_bytes(self) -> int: ...
    @property
    def num_pending_bytes(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def blocked_since(self) -> float | None:
        """Since when the call that carries the stream has had no room for what waits."""

    @property
    def first_token_at(self) -> float | None: ...
    @property
    def last_token_at(self) -> float: ...
    @property
    def first_token_s(self) -> float | None:
        """TTFT: seconds from arrival to the first token."""

    @property
    def per_token_s(self) -> float | None:
        """TPOT: mean seconds for each output token after the first."""

    @property
    def is_over(self) -> bool:
        """Every output has ended."""

    @property
    def has_begun(self) -> bool:
        """The engine has told of the prompt: something of the answer may have left."""

class Pump:
    """Puts an engine's steps into all streams that they concern; see csrc/stream/pump.h.

    The constants are bits of what happened to a request. wake_fd: an eventfd that is written to when a native
    thread's step has left something to collect.
    """

    PROMPT_DONE: int
    FIRST_TOKEN: int
    LEAVING: int
    OVER: int
    FAILED: int
    OVERFLOWED: int
    AWAITED: int

    def __init__(self, wake_fd: int = -1) -> None: ...
    def add(
        self,
        stream: Stream,
        owner: Any,
        *,
        tenant: int = 0,
        holding: int | None = None,
        leaves_at: float = ...,
    ) -> int:
        """Give the key of output 0; output i has key + i. owner comes back from collect(); remove() drops it.

        tenant: a small index. holding: in the ledger. leaves_at: tokens at which LEAVING happens.
        """

    def remove(self, key: int) -> int:
        """Let no step reach the request any more; give its tokens that collect() has not told of."""

    def step(
        self,
        rows: list[
            tuple[
                int,
                Sequence[int],
                Literal["stop", "length", "aborted", "failed"] | None,
                int | str | None,
                tuple[int | None, Sequence[tuple[Sequence[int], Sequence[float], int | None]] | None] | None,
                Sequence[tuple[Sequence[int], Sequence[float], int | None]] | None,
            ]
        ],
        now: float,
        /,
    ) -> None:
        """Put one step; rows as engines.base.StepRow. Nothing is put if a row is wrong: TypeError, ValueError."""

    def put_prompt(
        self,
        key: int,
        num_cached_tokens: int | None,
        logprobs: Sequence[tuple[Sequence[int], Sequence[float], int | None]] | None,
        now: float,
    ) -> None:
        """Put what an engine that makes text itself tells of the prompt."""

    def put_made(
        self,
        key: int,
        output_index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[tuple[Sequence[int], Sequence[float], int | None]] | None,
        ending: tuple[Literal["stop", "length"], int | str | None, bool] | None,
        now: float,
    ) -> None:
        """Put a delta of such an engine."""

    def collect(
        self, ledger: KvLedger | None
    ) -> tuple[int, list[tuple[int, int]], list[tuple[Any, int]], list[tuple[Any, int]]]:
        """Append to the ledger what steps brought since the last call, and tell of it.

        Gives the number of tokens; tenant and tokens; owner and what happened; owner and output index of outputs
        that ended by the rules while their engine goes on.
        """

class StopMatcher:
    """Finds stop strings in text that arrives in pieces; holds back what may still become one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Raises ValueError for an empty stop string."""

    def feed(self, text: str) -> str:
        """Take new text; give what may be shown, nothing after a match."""

    def flush(self) -> str:
        """Give what is held back; the output has ended otherwise."""

    @property
    def matched(self) -> int:
        """Index of the stop string that was found, else -1."""

# --- Scheduler: output lengths, KV ledger, places --------------------------------------------------

class LengthEstimator:
    """How long outputs get: a distribution learnt from finished requests, old ones counting less.

    A product-limit estimate (Kaplan and Meier): an output cut short says only that it would have been
    longer. One thread at a time.
    """

    def __init__(self, prior_mean: float, *, memory: float = 1000.0) -> None:
        """prior_mean: tokens, > 0, the mean until data outweighs it. memory: outputs after which an older
        one counts 1/e, > 0. Raises ValueError."""

    @property
    def num_observed(self) -> int: ...
    def observe(self, length: int, complete: bool, /) -> None:
        """Learn from an output of `length` tokens, 0..2**40; complete: it ended by itself, nothing cut it
        short. Raises ValueError, TypeError."""

    def mean(self, limit: int, /) -> float:
        """Expected length of an output that may have at most `limit` tokens, 0..2**40. Raises ValueError."""

    def survival(self, start: float, ahead: float) -> float:
        """Probability that an output of `start` tokens gets over `ahead` tokens more. Raises ValueError for
        negative arguments."""

class KvLedger:
    """Which blocks an engine's running requests hold, as far as can be known from outside.

    A shared prefix counts once, streamed tokens append. What one request holds is named by an int, unique
    for the life of the ledger: a released one is never found again. One thread at a time.

    Raises, in every method that takes such an argument: KeyError for an unknown or released holding,
    ValueError for a value out of range, TypeError for a wrong type; then nothing has changed.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool,
        headroom: float,
        lookahead_tokens: int,
        sigmas: float | None,
        longest: int,
    ) -> None:
        """Make a ledger for an empty cache.

        num_blocks: 1..2**30. block_size: a power of two in 1..65536. headroom: share of the blocks that
        admission leaves free, 0 <= h < 1. lookahead_tokens: slots that an output may hold ahead of its
        tokens. sigmas: None reserves max_tokens for every output, so that use never exceeds the cache;
        otherwise the expected use at each step ahead plus so many standard deviations must stay within it,
        outputs taken as independent. longest: tokens of the longest context.
        """

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_used_blocks(self) -> int:
        """Blocks held now, those for which there was no room included; so it may exceed num_blocks."""

    @property
    def num_overflows(self) -> int:
        """Tokens so far for which there was no room."""

    @property
    def is_predicting(self) -> bool:
        """Whether the use to come is predicted; not while there is room for the worst case."""

    def hash_tokens(self, tokens: TokenIds, salt: bytes, /) -> bytes:
        """Return the hashes of the full blocks, 16 bytes each, under a key of this ledger's own."""

    def can_ever_hold(self, num_prompt_tokens: int, num_outputs: int, /) -> bool:
        """Whether the prompt and one token of each output fit an empty cache."""

    def find_cached(self, hashes: BlockHashes, num_prompt_tokens: int, /) -> int:
        """Return how many prompt tokens are in the cache now; at least one is left to compute."""

    def find_longest(self, prompts: list[tuple[bytes, int]], window: int, /) -> int:
        """Return which of the first `window` prompts, each its hashes and its tokens, has most in the cache.

        The index, 0 for an empty list; the first of those that are equal. window: at least 1.
        """

    def hold(
        self,
        hashes: BlockHashes,
        num_prompt_tokens: int,
        num_outputs: int,
        max_tokens: int,
        is_fixed: bool,
        lengths: LengthEstimator,
        /,
    ) -> int | None:
        """Hold a prompt's blocks if the use to come stays within the cache; else None.

        hashes: of all full blocks of the prompt, from hash_tokens(); empty without a prefix cache.
        is_fixed: outputs will have max_tokens, whatever `lengths` says. A request that is alone is held if
        its prompt fits, for it could never run otherwise.
        """

    def num_cached_tokens(self, holding: int, /) -> int:
        """Return how many prompt tokens were found in the cache when the holding was made."""

    def append(self, holding: int, output_index: int, num_tokens: int, /) -> None:
        """Account for tokens that streamed."""

    def publish(self, holding: int, /) -> None:
        """The engine has computed the prompt: others may share it from now on."""

    def release(self, holding: int, /) -> None:
        """Give back everything; blocks of the prompt stay in the cache until their room is needed."""

    def reset(self) -> bool:
        """Forget cached prefixes; False, and nothing done, while anything is held."""

    def check(self) -> None:
        """Verify every invariant. Raises RuntimeError. For tests; O(blocks)."""

class RankCounts:
    """Of many lists that grow and shrink by one item, how many have at least x, with prefix sums."""

    def __init__(self) -> None: ...
    def add(self, x: int, amount: int, /) -> None:
        """Count `amount` lists more that have at least x items, 1..2**30, O(log x). Raises ValueError."""

    def at(self, x: int, /) -> int:
        """Return how many have at least x items."""

    def up_to(self, x: int, /) -> int:
        """Return the sum of at(1)..at(x), O(log x)."""

# --- vLLM's scheduler: the batched decode path ------------------------------------------------------

class DecodeBatch:
    """The decodes of a vLLM scheduler's running list, scheduled and updated in one call a step.

    A running request that needs one more decode and nothing else becomes resident at schedule():
    from then on its counters and new tokens are kept here, and its Python object lags behind until
    evict(), evict_all() or write_back(). Made for vLLM's Request objects and in its process only;
    one thread at a time. A failure inside a call leaves the batch unusable.
    """

    def __init__(
        self,
        manager: BlockManager,
        *,
        max_model_len: int,
        is_async: bool,
        resends_tokens: bool,
        native_hasher: object | None,
        statuses: tuple[Any, Any],
        output_type: type,
    ) -> None:
        """Make an empty batch on `manager`, which holds the requests' blocks.

        is_async: keep output placeholders, as vLLM's asynchronous scheduler does.
        resends_tokens: leave requests that were not in the last step to vLLM (its V1 runner has
            forgotten their tokens).
        native_hasher: the request hasher whose block hashes manager.hasher goes on with; for any
            other, the request's own hasher is called when a block fills.
        statuses: what Request.status becomes at a stop token and at a length limit.
        output_type: vLLM's EngineCoreOutput.
        Raises ValueError on max_model_len < 1.
        """
    def schedule(
        self,
        running: list[Any],
        sequences: dict[str, int],
        last_scheduled: set[str] | None,
        token_budget: int,
        step: int,
        *,
        shows_adapters: bool = False,
    ) -> tuple[list[Any] | None, dict[str, int], tuple[list[str], list[Any], list[int], list[int]]] | None:
        """Schedule one token for each decode that can be told apart from the rest of the step.

        sequences: sequence of `manager` by request id. step: number of the step, one up from the last.
        shows_adapters: leave one due request of each adapter among the others, for vLLM to count.
        Returns (the other running requests or None, {request id: 1}, (request ids, new block ids,
        computed tokens, output tokens)); or None where the step is all vLLM's: too few blocks or
        tokens for everything that runs, or nothing resident runs. Then call evict_all() before vLLM's schedule().
        Raises RuntimeError where a resident request is no longer in `running`.
        """
    def merge(
        self,
        running: list[Any],
        num_scheduled: dict[str, int],
        native: tuple[list[Any], list[Any], list[Any], list[Any]],
        other_scheduled: dict[str, int],
        other: tuple[list[Any], list[Any], list[Any], list[Any]],
    ) -> tuple[dict[str, int], tuple[list[str], list[Any], list[int], list[int]]]:
        """Merge what schedule() returned with what vLLM scheduled of the rest, in running order."""
    def update(
        self,
        num_scheduled: dict[str, int],
        row_indices: dict[str, int],
        sampled: list[list[int]],
        logprobs: object | None,
        requests: dict[str, Any],
    ) -> tuple[
        dict[int, list[Any]],
        list[tuple[Any, Any]],
        list[tuple[int, Any, Any]],
        dict[str, int],
        list[tuple[int, int, str]],
    ]:
        """Take in the tokens that a step sampled.

        Returns (outputs by client index; (request, output) for first outputs; (position, request,
        output) for requests that stopped, already evicted; scheduled tokens by request id of the rows
        left to vLLM; and for each of those the place of its output, None for now: client index, index
        in that client's outputs, request id).
        """
    def evict(self, request: object, /) -> None:
        """Bring a request up to date and forget it; nothing if it is not resident."""
    def evict_all(self) -> None: ...
    def write_back(self) -> None:
        """Bring all resident requests up to date and keep them."""
    @property
    def num_rows(self) -> int: ...
    @property
    def template_version(self) -> int:
        """Changes whenever the set of scheduled rows does."""
    def counters(self) -> dict[str, int]:
        """rows_scheduled, rows_updated, rows_adopted, rows_evicted since the start."""

# vLLM's engine core: its messages.

class WireError(ValueError):
    """A message is not what the tested vLLM sends."""

class CoreOutputs:
    """The last message of a vLLM engine core, decoded: EngineCoreOutputs. For one thread at a time."""

    def __init__(self) -> None: ...
    def decode(self, frames: Sequence[bytes | memoryview]) -> None:
        """Decode a message and the frames of its tensors; runs without the GIL. Raises WireError."""

    def rows(self) -> list[tuple[int, list[int], tuple[Any, ...] | None]]:
        """Give (key, token ids, rest) for each output whose request id carries a key.

        rest: None for tokens alone; else (finish, cause, cached, logprobs, prompt logprobs). finish: 0 none,
        1 stop, 2 length, 3 aborted, 4 failed. cause: stop token, stop string or None. cached: prompt tokens
        from the prefix cache, -1 not known, None if the row does not tell of the prompt. logprobs: for each
        token ([(token id, logprob), ...], rank of the first), or None.
        """

    @property
    def num_rows(self) -> int: ...
    @property
    def stats(self) -> tuple[int, int, float] | None:
        """Running and waiting requests and the share of KV blocks in use; None if the message has none."""

    @property
    def num_preemptions(self) -> int: ...
    @property
    def has_utility(self) -> bool:
        """The message answers a utility call."""

# Only where the door is built.
class DoorCall:
    """A handle to a client's call; without effect once the call is over."""

    @property
    def is_over(self) -> bool: ...
    def send_headers(self, metadata: Iterable[tuple[str, str | bytes]], /) -> None:
        """Raises ValueError for metadata that gRPC does not allow."""
    def write(self, message: bytes, /) -> bool:
        """Send a message. True: so much is unsent that the writer should wait for the room event."""
    def finish(self, code: int, message: str, trailers: Iterable[tuple[str, str | bytes]], /) -> None: ...
    def reset(self) -> None: ...
    def acknowledge(self, num_bytes: int, /) -> None:
        """A request message of so many bytes is no longer held."""
    def carry(self, stream: Stream) -> None:
        """Send what steps put into the stream from now on, whenever an empty take() waits for it."""
    def compress(self) -> None: ...

class MessageShape:
    """Counts the values of a protobuf message without parsing it; see csrc/requests/message_shape.h.

    types: for each type of message, its own first, its fields that are numbers or messages: (number, kind), the kind
    being the index of a type, or packed as -1 varints, -2 four bytes, -3 eight bytes. Raises ValueError.
    """

    def __init__(self, types: Sequence[Sequence[tuple[int, int]]]) -> None: ...
    def find_excess(self, message: bytes, max_values: int, max_numbers: int) -> list[int] | None:
        """The field numbers that lead to the value with which a message holds more than it may."""

def read_plain_generate(
    message: bytes,
) -> tuple[str, str, list[int], int, bytes, str, str, str, str] | None:
    """What a plain GenerateRequest holds, None if the message is not plain; see csrc/requests/plain_generate.h.

    (model, text, token ids, the largest of them or -1, SamplingParams as bytes, request id, tenant, cache salt, session).
    """

class PlainCall:
    """A call whose request is plain: unpack() it, or accept() it, and finish() or end() it."""

    def unpack(self) -> tuple[Any, bytes]:
        """The payload of the call's own event, and its message. Raises ValueError once it was accepted."""
    def accept(self, request_id: str, prefix_key: str, /) -> None:
        """Send the initial metadata. prefix_key: "" is none."""
    def make_carried(
        self,
        maker: StreamMaker,
        request_id: str,
        num_prompt_tokens: int,
        seed: int,
        max_tokens: int,
        arrived_at: float,
        /,
    ) -> Stream:
        """Make the request's stream, of which every step is carried to the call."""
    def end(self, stream: Stream, trailers: DoorTrailers, /) -> bool:
        """Send what is left, the summary and OK. False, and nothing done, if the client is behind."""
    def hand_over(self, stream: Stream, drops: bool, /) -> bool:
        """Send what is left, or drop it, before a status. False, and nothing done, if the client is behind."""
    def finish(self, code: int, message: str, trailers: Iterable[tuple[str, str | bytes]], /) -> None: ...
    def reopen(self) -> DoorCall:
        """The same call for a handler."""

class DoorTrailers:
    """Trailers that many calls end with."""

    def __init__(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Raises ValueError for metadata that gRPC does not allow."""

class StreamMaker:
    """Makes the streams of requests that are alike; arguments as Stream's."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        num_outputs: int,
        stop: Sequence[str],
        eos_token_ids: Sequence[int],
        stop_token_ids: Sequence[int],
        min_tokens: int,
        max_tokens: int,
        include_stop: bool,
        skip_special: bool,
        model: str,
        engine: str,
        deployment: str,
        sampler: str,
        max_pending_bytes: int,
    ) -> None:
        """Raises ValueError."""

class Door:
    """A gRPC server. Options: see csrc/door/options.h."""

    def __init__(self, **options: float | list[str] | tuple[str, bytes]) -> None: ...
    def listen(self, host: str, port: int, use_tls: bool, /) -> int:
        """Listen, and give the port. Raises OSError."""
    def use_tls(self, certificate: bytes, key: bytes, client_ca: bytes, /) -> None:
        """Use these PEM texts for new connections. Raises ValueError and changes nothing if they are unfit."""
    def start(self) -> None: ...
    @property
    def has_ring(self) -> bool:
        """Whether what many connections send at once leaves in one system call, by io_uring."""
    def fileno(self) -> int:
        """Readable when there are events to take."""
    def take(self) -> tuple[list[tuple[int, int, Any]], list[Any]]:
        """The events that came, (kind, call id, payload), and the calls that pick_plain() picked.

        0: a call, (DoorCall, path, peer, metadata, timeout in s or None, accepts gzip); 1: a message, bytes;
        2: half-closed; 3: cancelled, why; 4: room; 5: calls were refused by bounded_paths, their path, and in the call
        id's place their number. If many came, the rest is left for the next time, and fileno() stays readable.
        A picked call began before the events beside it: (call id, PlainCall, peer, timeout in s or None, model, text,
        token ids, the largest of them, SamplingParams as bytes, request id, drawn if none was sent, tenant, cache salt,
        session, a seed).
        """
    def pick_plain(self, path: str) -> None:
        """Read requests of this method, which takes a GenerateRequest; see csrc/requests/plain_generate.h."""
    def stop_picking(self) -> list[tuple[int, int, Any]]:
        """Pick no more, and give the events of calls whose requests have not come."""
    def hold(self) -> None:
        """Let what this thread writes wait, to leave together, until let_go()."""
    def let_go(self) -> None: ...
    def drain(self) -> None: ...
    def stop(self, grace_s: float, /) -> None: ...
    def totals(self) -> dict[str, int]: ...
    def connections(self) -> list[dict[str, Any]]: ...

class CoreReader:
    """Puts what a vLLM engine core sends into the pumps of the requests that it concerns.

    In a thread of its own, without the GIL, after start(); otherwise where read() is called. All methods are for one
    thread.
    """

    def __init__(self, fd: int, unread: bytes) -> None:
        """fd: a connected non-blocking stream socket whose peer has introduced itself, which stays the caller's.

        unread: what was read from it already. Raises RuntimeError where no descriptor is left.
        """

    def fileno(self) -> int:
        """What is readable while there is something for take()."""

    def open(
        self,
        key: int,
        outlet: Outlet,
        pump_key: int,
        *,
        num_logprobs: int,
        num_prompt_logprobs: int,
        first: int,
    ) -> None:
        """Expect an output whose request id in the engine core ends in "-" and `key`, in hexadecimal.

        key: at least 1, never used twice. pump_key: the output's in outlet.pump. first: the key of the request's
        output 0, 0 for that output itself, which is opened first.
        """

    def close(self, key: int) -> bool:
        """Forget an output; whether the engine had not ended it."""

    def start(self) -> None:
        """Read from now on, which makes the socket one that blocks. Not with vocabularies that are functions."""

    def stop(self) -> None:
        """Read no more and break the connection; idempotent."""

    def read(self) -> bool:
        """Read once and take at most 16 messages, or a part of a large one; whether there is more to take."""

    def take(
        self,
    ) -> tuple[
        list[Outlet],
        list[tuple[int, int, int]],
        tuple[int, int, float] | None,
        int,
        list[bytes],
        str | None,
    ]:
        """Give what has come since the last call.

        Outlets whose pumps got rows; outputs that ended with an error, which are not put into their pumps: (key,
        finish as in CoreOutputs.rows, tokens in the last row), finish 1: no token was admissible; the last
        CoreOutputs.stats; preemptions; messages that answer utility calls, to be decoded; and, once nothing more comes,
        why, "" if the peer has only gone.
        """

    @property
    def num_open(self) -> int: ...

def ask_for_sessions(is_wanted: bool) -> None:
    """Have processes that fork() makes of this one begin sessions, until False was given as often as True.

    vfork() and posix_spawn(), which Python's subprocess uses, are not concerned.
    """

def read_processing_request(
    data: bytes,
) -> tuple[int, bool, dict[str, str], bytes, int, int, list[str] | None, str]:
    """Read an envoy.service.ext_proc.v3.ProcessingRequest.

    Gives the kind (its field number), end_of_stream, headers or trailers, body, the body modes of request and
    response, -1 where the message does not tell them, the addresses of envoy.lb.subset_hint or None, and the attribute
    source.address, "" without.
    Raises ValueError if it is none.
    """

class EppPrompt:
    """What of a request bears on where it should go, read from the message's bytes; one cut short gives what is there."""

    def __init__(self, message: bytes, method: str) -> None:
        """method: "Generate" or "Chat". Raises ValueError where the bytes are no such request."""

    @property
    def model(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def cache_salt(self) -> str: ...
    @property
    def adapter(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def has_token_ids(self) -> bool:
        """Whether the prompt came as token ids."""

    @property
    def num_tokens(self) -> int:
        """Length of the prompt: exact for token ids, else a quarter of the text's bytes."""

    def token_ids(self) -> bytes:
        """Return the token ids as int32s; empty for text."""

    def hash(self, hasher: BlockHasher) -> bytes:
        """Hash the full blocks, 16 bytes each, of token ids or of text in four-byte words.

        Model, adapter and salt enter the root, and so does which of the two it is.
        """

class PrefixIndex:
    """Which replicas hold which block hashes. Hashes are given as bytes, 16 each. Not thread-safe."""

    def __init__(self, max_links: int) -> None:
        """max_links: blocks at replicas that are remembered, 1 to 2^31. Raises ValueError outside."""

    def set_capacity(self, replica: int, max_blocks: int) -> None:
        """Remember so many blocks of a replica at most; none without a call."""

    def touch(self, replica: int, hashes: bytes) -> None:
        """Suppose that the replica holds a prompt's blocks; forget those longest unused beyond its capacity."""

    def store(self, replica: int, hashes: bytes) -> None:
        """Take in that the replica holds these blocks."""

    def erase(self, replica: int, hashes: bytes) -> None:
        """Take in that the replica does not hold these blocks any more."""

    def clear(self, replica: int) -> None:
        """Forget a replica's blocks."""

    def find(self, hashes: bytes) -> dict[int, int]:
        """Return, by replica, how many of a prompt's first blocks it holds; those with none are left out."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_links(self) -> int: ...
    def memory_bytes(self) -> int: ...
    def check(self) -> bool:
        """Whether all that must agree does; for tests."""

class Picker:
    """Judges replicas by the prompt tokens that come before a request's first token there. Not thread-safe."""

    def __init__(
        self,
        *,
        prefill_per_s: float,
        running_tokens: float,
        waiting_tokens: float,
        kv_penalty: float,
        report_lag_s: float,
        report_life_s: float,
        max_waiting: float,
    ) -> None:
        """See twinjet.epp.settings. report_lag_s: how old a report may be when it comes."""

    def add(self) -> int:
        """Return the number of a new replica."""

    def remove(self, replica: int) -> None:
        """Forget a replica; its number comes again. KeyError if there is none, as below."""

    def set_kv_tokens(self, replica: int, kv_tokens: float) -> None:
        """Tell the size of the replica's KV cache; 0: not known."""

    def report(
        self,
        replica: int,
        now: float,
        *,
        waiting: float,
        running: float,
        waiting_tokens: float,
        kv_utilization: float,
    ) -> None:
        """Take in a load report; now in seconds on the clock of all calls."""

    def rank(
        self,
        candidates: bytes,
        num_tokens: int,
        lookups: Sequence[tuple[PrefixIndex, bytes, int]],
        now: float,
        random: int,
        count: int,
    ) -> list[tuple[int, float, int, float]]:
        """Order the candidates (uint32s) and return the best `count`: (replica, cost, cached tokens, waiting).

        lookups: (index, hashes, tokens a block). random: 64 bits, which decide among equals.
        """

    def begin(self, replica: int, num_tokens: int, now: float) -> int:
        """Take in that a request with so many tokens to compute went there; return its ticket."""

    def end(self, replica: int, ticket: int, num_tokens: int) -> None:
        """Take in that it has ended."""

    def in_flight(self, replica: int) -> int: ...
    def __len__(self) -> int: ...
