"""Sizes that both sides agree on and that the options are checked against. No imports: read before torch is."""

SLOTS = 2  # a lane's double buffer
MAX_SLOTS = 4
MAX_LANES = 64
MAX_THREADS = 1024
SLOT_ALIGNMENT = 4096  # of slot_bytes: a page, so that every area can be registered with a GPU on its own
MAX_FRAME_BYTES = 256 << 20  # a peer that sends more in one frame is disconnected before it is buffered
WIRE_DTYPE_NAMES = ("float32", "bfloat16", "float16")
WEIGHT_DIGITS = {8: 1, 12: 2}  # of int8, that an integer weight of so many bits is made of
DECODE_ROWS = 16  # up to here a call is a decode step's: short, and made again and again
MOST_PORTIONS = 64  # requests in one micro-batch, so rows of the largest step that decodes alone
MOST_LOADING_S = 1800.0  # that a GPU side may take for its weights, while it says that it is alive
HELPER_THREADS = 4  # of an event loop, for what blocks: an enclave's threads are counted before it starts
MASK_BLOCK_BYTES = 4 << 20  # of one request to a mask peer, in words of masks and of their products
