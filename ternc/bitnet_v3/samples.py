"""A few multiple-choice questions, written for this package, to see that an evaluation runs."""

from __future__ import annotations

from typing import Any

SAMPLES: dict[str, tuple[dict[str, Any], ...]] = {
    "hellaswag": (
        {
            "prompt": "She fills the kettle, switches it on and waits. When the water boils, she",
            "choices": [
                " pours it over the tea leaves.",
                " folds it into the drawer.",
                " drives it to the station.",
                " reads it aloud.",
            ],
            "answer": 0,
        },
        {
            "prompt": "He ties his shoes, stretches his legs and steps onto the track. Then he",
            "choices": [" bakes.", " starts to run.", " closes the book.", " waters the lawn."],
            "answer": 1,
        },
        {
            "prompt": "The rain begins, so the children pick up their toys and",
            "choices": [" plant them.", " fry them.", " go inside.", " sail away."],
            "answer": 2,
        },
    ),
    "mmlu": (
        {
            "prompt": "Question: how many sides does a hexagon have?\nAnswer:",
            "choices": [" four", " five", " six", " eight"],
            "answer": 2,
        },
        {
            "prompt": "Question: which gas do plants take from the air to grow?\nAnswer:",
            "choices": [" helium", " carbon dioxide", " neon", " argon"],
            "answer": 1,
        },
        {
            "prompt": "Question: what is 7 times 8?\nAnswer:",
            "choices": [" 54", " 63", " 48", " 56"],
            "answer": 3,
        },
    ),
    "truthfulqa": (
        {
            "prompt": "Question: what happens if you read in dim light?\nAnswer:",
            "choices": [
                " Your eyes may tire, and recover with rest.",
                " You go blind within a year.",
            ],
            "answer": 0,
        },
        {
            "prompt": "Question: how much of the brain do people use?\nAnswer:",
            "choices": [" Only ten percent of it.", " All of it, over a day."],
            "answer": 1,
        },
        {
            "prompt": "Question: do goldfish forget everything after three seconds?\nAnswer:",
            "choices": [" Yes, always.", " No, they can be trained over months."],
            "answer": 1,
        },
    ),
}
