"""Launch tables of attention's forward, by pointers and by tensor descriptors, and of decoding.

`attention_launch.py` says how a row is chosen, and what reasons speak of.
"""

from .attention_tiles import BUT_HOPPER, CDNA, LARGE, NVIDIA, RDNA, SMALL, AttentionTiles, Row

FORWARD = (
    Row(
        ("sm_90",),
        "half",
        256,
        AttentionTiles(16, 128, 8, 2),
        "one token at a time or a few; on H200 1.19 times as fast as 32 keys. 140 KiB",
        q_len=16,
    ),
    Row(
        BUT_HOPPER,
        "half",
        256,
        AttentionTiles(16, 32, 8, 2),
        "one token at a time or a few: 16 rows are the least that a matrix instruction takes; 64 keys in 4 warps spill",
        q_len=16,
    ),
    Row(
        CDNA,
        "half",
        256,
        AttentionTiles(16, 64, 4, 1),
        "one token at a time or a few: 16 rows are the least that a matrix instruction takes",
        q_len=16,
    ),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(64, 64, 4, 2),
        "short sequences: half of a tile of 128 rows would be padding",
        q_len=64,
    ),
    Row(
        BUT_HOPPER,
        "half",
        128,
        AttentionTiles(64, 64, 8, 2),
        "short sequences; 192 to 255 registers, 83 KiB at most; in 4 warps the guarded loop spills, of 32 keys too",
        q_len=64,
    ),
    Row(
        ("sm_90",),
        "half",
        64,
        AttentionTiles(128, 64, 4, 4, products=True, compiled_stride=True),
        "on H200 1.50 times as fast as 128 keys in 8 warps with 2 stages: two programs of 80 KiB at once, one's "
        "exponents while the other multiplies. 3 stages 1.46; 64 rows in 4 warps 1.43, by descriptors 1.49",
    ),
    Row(
        ("sm_100",),
        "half",
        64,
        AttentionTiles(128, 128, 8, 2),
        "two warpgroups of 64 rows each; 223 to 255 registers, and 7 instructions a score besides the tensor cores'; "
        "64 keys take 9",
    ),
    Row(("sm_100",), "half", 128, AttentionTiles(128, 64, 8, 2), "254 registers; 128 keys spill in the guarded loop"),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(128, 128, 8, 3, products=True, compiled_stride=True),
        "on H200 1.20 times as fast as with 2 stages; 64 keys in 8 warps 1.09, in 4 warps by descriptors 1.13. 254 "
        "registers, 224 KiB; 7.9 instructions a score besides the tensor cores', of any stride 8.1",
    ),
    Row(
        ("sm_90",),
        "half",
        256,
        AttentionTiles(128, 64, 8, 2),
        "spills 60 registers, 180 of a window, and on H200 is 5.7 times as fast as 32 rows, which spill none but "
        "multiply without the instructions for 64 rows; 128 rows of 32 keys 5.5, 64 in 4 warps 4.1",
        spills=("sm_90",),
    ),
    Row(("sm_100",), "half", 256, AttentionTiles(32, 64, 8, 2), "228 registers, 84 KiB; of 64 rows 25 spill"),
    Row(("sm_80", *SMALL), "half", 64, AttentionTiles(128, 64, 8, 3), "228 registers, 48 KiB; in 4 warps they spill"),
    Row(
        ("sm_80",),
        "half",
        128,
        AttentionTiles(128, 64, 8, 3),
        "96 KiB; 2 stages spill 4. A window's code spills 18, none in a loop; 21 with products or 32 keys, 409 in 16 "
        "warps; 64 rows spill none, and take 29 instructions a score where these take 12",
        spills=("sm_80",),
    ),
    Row(
        SMALL,
        "half",
        128,
        AttentionTiles(128, 64, 8, 2, products=True, compiled_stride=True),
        "255 registers, 64 KiB; of a window spill 38 where addresses are no products, with 3 stages 10. On sm_120 a "
        "window's code spills 35, 27 where addresses are no products, with 3 stages 53",
        spills=("sm_120",),
    ),
    Row(("sm_80", *SMALL), "half", 256, AttentionTiles(32, 64, 8, 2), "248 registers, 84 KiB; 64 rows spill 18 to 76"),
    Row(CDNA, "half", 64, AttentionTiles(128, 64, 4, 1), "268 of 512 registers, 16 KiB"),
    Row(CDNA, "half", 128, AttentionTiles(128, 32, 4, 1), "280 of 512 registers; 64 keys take 374"),
    Row(CDNA, "half", 256, AttentionTiles(32, 32, 4, 1), "16 KiB; 64 rows spill up to 33, and 8 waves 15"),
    Row(RDNA, "half", 64, AttentionTiles(64, 32, 8, 1), "219 of 256 registers; 64 keys spill"),
    Row(RDNA, "half", 128, AttentionTiles(32, 16, 8, 1), "249 registers; 64 rows of 32 keys spill 3, 32 rows 73"),
    Row(RDNA, "half", 256, AttentionTiles(16, 16, 16, 1), "92 spill, in 8 warps 252; no tile is smaller", spills=RDNA),
    Row(
        ("sm_80", "sm_86", "sm_89"),
        "ieee",
        64,
        AttentionTiles(32, 16, 4, 2),
        "152 registers on sm_80, 222 on the others; in 8 warps 6 and 18 spill",
    ),
    Row(("sm_90", "sm_100", "sm_120"), "ieee", 64, AttentionTiles(32, 32, 8, 2), "116 registers; in 4 warps spill 20"),
    Row(NVIDIA, "ieee", 128, AttentionTiles(16, 32, 8, 2), "32 rows of 16 keys spill up to 36"),
    Row(NVIDIA, "ieee", 256, AttentionTiles(16, 16, 16, 2), "in 8 warps 16 to 23 registers spill"),
    Row(CDNA, "ieee", 128, AttentionTiles(32, 32, 4, 1), "308 registers; matrix cores multiply float32 exactly"),
    Row(
        CDNA,
        "ieee",
        256,
        AttentionTiles(32, 16, 4, 1, products=True),
        "299 of 512 registers; of a window 1 spills on gfx90a where addresses are no products",
    ),
    Row(RDNA, "ieee", 128, AttentionTiles(16, 16, 16, 1), "no matrix cores for float32: 226 registers; 8 warps spill"),
    Row(
        RDNA,
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 289 spill, in 16 warps 226",
        spills=RDNA,
    ),
    Row(("sm_80", *SMALL, *LARGE), "tf32", 64, AttentionTiles(128, 64, 8, 2), "255 registers on sm_90, 96 KiB"),
    Row(BUT_HOPPER, "tf32", 128, AttentionTiles(64, 32, 8, 2), "of 128 rows 4 to 79 registers spill"),
    Row(("sm_90",), "tf32", 128, AttentionTiles(64, 16, 8, 2), "of 32 keys 7 to 23 registers spill"),
    Row(("sm_80", *LARGE), "tf32", 256, AttentionTiles(32, 32, 8, 2), "254 registers; 64 rows spill on sm_90"),
    Row(SMALL, "tf32", 256, AttentionTiles(32, 16, 8, 2), "70 KiB; 32 keys do not fit"),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(128, 64, 8, 3, products=True),
        "with dropout on H200 1.85 times as fast as 64 rows in 8 warps, 64 rows in 4 warps 1.84; 30 registers spill "
        "where there is everything at once",
        scores="rich",
        spills=("sm_90",),
    ),
    Row(
        ("sm_80", "sm_86", "sm_89", "sm_100"),
        "half",
        128,
        AttentionTiles(64, 64, 8, 2, products=True),
        "255 registers on sm_80; 6 spill where addresses are no products. On sm_120 spill 39, and 24",
        scores="rich",
    ),
    Row(
        ("sm_90",),
        "half",
        256,
        AttentionTiles(128, 64, 8, 2),
        "spills, and with dropout on H200 is 5.4 times as fast as 32 rows and keys, which spill none; 128 rows of 32 "
        "keys 4.3",
        scores="rich",
        spills=("sm_90",),
    ),
    Row(BUT_HOPPER, "half", 256, AttentionTiles(32, 32, 8, 2), "241 registers; 64 rows spill", scores="rich"),
    Row(CDNA, "half", 64, AttentionTiles(64, 64, 4, 1), "322 of 512 registers", scores="rich"),
    Row(CDNA, "half", 128, AttentionTiles(64, 32, 4, 1), "273 registers", scores="rich"),
    Row(CDNA, "half", 256, AttentionTiles(32, 16, 8, 1), "214 registers; 64 rows spill", scores="rich"),
    Row(
        RDNA,
        "half",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 413 spill, in 16 warps 191",
        scores="rich",
        spills=RDNA,
    ),
    Row(NVIDIA, "ieee", 256, AttentionTiles(16, 16, 8, 2), "196 registers; with one stage 261 spill", scores="rich"),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 4, 1), "the smallest tile there is", scores="rich"),
    Row(
        RDNA,
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 548 spill",
        scores="rich",
        spills=RDNA,
    ),
    Row(NVIDIA, "tf32", 256, AttentionTiles(16, 16, 8, 1), "the smallest tile there is", scores="rich"),
)

# The forward's other choice, where a target has it; of 128 columns sm_120 spills. Off until a GPU has confirmed it:
# `python -m trilby.bench --device cuda` measures both, and says which to turn on. On H200 it stays off: at 4096 tokens
# and 64 columns the fastest tiles by descriptors take 1.01 times as long as those by pointers, of 128 columns 1.05.
# Warps that only load are no choice yet: the compiler (triton 3.9) breaks off on sm_100.
FORWARD_BY_DESCRIPTOR = (
    Row(
        ("sm_90",),
        "half",
        64,
        AttentionTiles(128, 128, 8, 2, descriptors=True),
        "205 registers; 6.9 instructions a score besides the tensor cores', by pointers 7.1",
    ),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(128, 128, 8, 2, descriptors=True),
        "248 registers, 161 KiB; 7.6 instructions a score, by pointers 7.9",
    ),
    Row(("sm_100",), "half", 64, AttentionTiles(128, 128, 8, 2, descriptors=True), "254 registers, 81 KiB"),
    Row(("sm_100",), "half", 128, AttentionTiles(128, 64, 8, 2, descriptors=True), "242 registers, 97 KiB"),
    Row(("sm_120",), "half", 64, AttentionTiles(128, 64, 8, 2, descriptors=True), "176 registers, 32 KiB"),
)

# Of a key head all rows are in one tile: a row serves as many as its tile has.
DECODE = (
    Row(
        ("sm_90",),
        "half",
        256,
        AttentionTiles(16, 32, 4, 3),
        "a token of a few heads; on H200 1.07 times as fast as in 8 warps with 2 stages, and spills none; 64 keys in 4 "
        "warps 1.18, which spill 62 of pages, and 2 warps 1.22, which spill 232",
        q_len=16,
        scores="any",
    ),
    Row(BUT_HOPPER, "half", 256, AttentionTiles(16, 32, 8, 2), "a token of a few heads", q_len=16, scores="any"),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(64, 64, 4, 3, products=True),
        "a few tokens of many heads; on H200 1.28 times as fast as 32 keys in 8 warps with 2 stages",
        q_len=64,
        scores="any",
        spills=("sm_90",),
    ),
    Row(
        BUT_HOPPER,
        "half",
        128,
        AttentionTiles(64, 32, 8, 2, products=True),
        "a few tokens of many heads; 10 registers spill on sm_80 where addresses are no products. On sm_120 rich "
        "scores spill 59, and 57",
        q_len=64,
        scores="any",
        spills=("sm_120",),
    ),
    Row(
        ("sm_90",),
        "half",
        256,
        AttentionTiles(32, 32, 4, 3),
        "on H200 1.26 times as fast as in 8 warps with 2 stages, and 40 registers spill; 64 keys 1.28, which spill 183",
        q_len=32,
        scores="any",
        spills=("sm_90",),
    ),
    Row(BUT_HOPPER, "half", 256, AttentionTiles(32, 32, 8, 2), "64 rows spill", q_len=32, scores="any"),
    Row(CDNA, "half", 256, AttentionTiles(16, 32, 4, 1), "a token of a few heads", q_len=16, scores="any"),
    Row(CDNA, "half", 128, AttentionTiles(64, 32, 4, 1), "a few tokens of many heads", q_len=64, scores="any"),
    Row(NVIDIA, "tf32", 256, AttentionTiles(16, 16, 8, 1), "a token of a few heads", q_len=16, scores="any"),
    Row(NVIDIA, "ieee", 256, AttentionTiles(16, 16, 8, 2), "with one stage 249 spill", q_len=16, scores="any"),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 8, 1), "a token of a few heads", q_len=16, scores="any"),
    Row(RDNA, "half", 64, AttentionTiles(16, 16, 4, 1), "238 registers; 32 keys spill 2 to 9", q_len=16, scores="any"),
    Row(RDNA, "half", 256, AttentionTiles(16, 16, 8, 1), "16 warps spill 284", q_len=16, scores="any", spills=RDNA),
    Row(RDNA, "ieee", 256, AttentionTiles(16, 16, 8, 1), "16 warps spill 508", q_len=16, scores="any", spills=RDNA),
)
