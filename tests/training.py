"""A small byte model, text of known structure, loaders: what the training tests share."""

import random

import torch
from torch.utils.data import DataLoader

from ternc.demo.model import ByteDecoder

WORDS = ("ternary ", "weights ", "train ", "like ", "float ", "ones ", "do ", "here. ")


def tiny_model(width=32, layers=2, context=32):
    return ByteDecoder(width, layers, 2, 48, context)


def text(length=20_000, seed=0):
    """Random words: predictable inside a word, a coin of three bits at its start."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(WORDS), (length // 4,), generator=generator).tolist()
    joined = "".join(WORDS[i] for i in chosen).encode()[:length]
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def chain(length, seed, words=64, followers=4):
    """Bytes of a Markov chain over made-up words: the same language for every seed."""
    language = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    spelled = [
        "".join(language.choice(letters) for _ in range(language.randint(3, 8))) + " "
        for _ in range(words)
    ]
    after = [[language.randrange(words) for _ in range(followers)] for _ in range(words)]
    draw, word, made = random.Random(seed), 0, []
    while len(made) < length:
        made.extend(spelled[word].encode())
        word = draw.choice(after[word])
    return bytes(made[:length])


def windows(count=24, length=33, seed=0):
    """int64 [count, length] of the text."""
    body = text(seed=seed)
    return body[: count * length].view(count, length).long()


def loader(batch_size=4, count=24, seed=0, shuffle=True, order=0):
    """Batches [batch, length] of windows, in an order that a generator of its own draws."""
    generator = torch.Generator().manual_seed(order)
    return DataLoader(windows(count, seed=seed), batch_size, shuffle=shuffle, generator=generator)
