"""How arrays are cut into the blocks that a kernel takes at a time."""


def largest_divisor(length: int, most: int, of: int) -> int:
    """The largest multiple of `of`, up to `most`, that divides length."""
    return next(n for n in range(most // of * of, 0, -of) if length % n == 0)
