# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""A shared cache in 8 or 4 bits: a scale of 16 bits for every token and head, numbers in the key slot, scales in the value slot.

In: what keys and values share, before bias, norm and rope; middle and size of its channels, where they are known. Out: integers and
scales, or the numbers again. Never: quantises what is quantised already.

One scale serves all numbers of a head, so they are made alike first: rounded is (s - middle) / size, both fixed for a channel.

A head of n numbers takes n + 2 bytes in 8 bits and n / 2 + 2 in 4, in any cache that takes keys and values of different widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kvshare_channels import Channels

LEAST = 2.0**-24  # the least positive float16
BITS = (8, 4)


def in_steps(x: Tensor, bits: int, channels: Channels | None = None) -> tuple[Tensor, Tensor]:
    """Numbers x (..., kv heads, tokens, n) in steps of s: round(x / s) within +-most, s = max |x| / most, most = 2^(bits - 1) - 1.

    With channels, (x - middle) / size is rounded in place of x, and the number of largest size becomes -2^(bits - 1), by an s that
    may be negative: this is the integer that is left over otherwise.

    Returns:
        whole numbers (..., n), float32, and s, (..., 1), float16.
    """
    x, most = x.float(), 2 ** (bits - 1) - 1
    if channels is None:
        step = (x.abs().amax(-1, keepdim=True) / most).half().clamp_min(LEAST)
        return (x / step.float()).round().clamp(-most, most), step
    x = (x - channels.middle) / channels.size
    step = (x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -(most + 1)).half()
    step = torch.where(step.abs() < LEAST, LEAST, step)
    return (x / step.float()).round().clamp(-most - 1, most), step


def restored(x: Tensor, channels: Channels | None) -> Tensor:
    """Steps times whole numbers, float32, as the numbers that they stand for."""
    return x if channels is None else x * channels.size + channels.middle


def quantise(x: Tensor, bits: int, channels: Channels | None = None) -> tuple[Tensor, Tensor]:
    """Numbers x (..., kv heads, tokens, n) as integers of 8 or 4 bits, see `in_steps`.

    Returns:
        in 8 bits (..., n), int8; in 4 bits (..., n / 2), uint8: lower bits hold the first half, upper ones the second, both plus 8;
        and s, (..., 1), float16.
    """
    whole, scale = in_steps(x, bits, channels)
    if bits == 8:
        return whole.to(torch.int8), scale
    first, second = (whole + 8).to(torch.uint8).chunk(2, -1)
    return first | second << 4, scale


def dequantise(numbers: Tensor, scale: Tensor, dtype: torch.dtype, channels: Channels | None = None) -> Tensor:
    """What `quantise` was given, with the same channels, rounded: (..., n) in `dtype`."""
    if numbers.dtype == torch.uint8:
        numbers = torch.cat([numbers & 15, numbers >> 4], -1).float() - 8
    return restored(numbers.float() * scale.float(), channels).to(dtype)
