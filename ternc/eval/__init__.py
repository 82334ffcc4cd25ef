"""How good a model is: text, agreement with the float model, embeddings. Data in, numbers out."""

from ternc.eval.agreement import Agreement, compare_logits
from ternc.eval.embeddings import EmbeddingScore, compare_embeddings, mean_pooled
from ternc.eval.harness import score_tasks
from ternc.eval.text import TextScore, score_text, score_tokens

__all__ = [
    "Agreement",
    "EmbeddingScore",
    "TextScore",
    "compare_embeddings",
    "compare_logits",
    "mean_pooled",
    "score_tasks",
    "score_text",
    "score_tokens",
]
