"""Memory that lasts for a run besides the tensors of its steps: library code, objects, and the decoder.

Library code that is loaded after the plan, and objects of the model, the method and the decoder, take 17 to 40 MB on
Linux. The maximum is used, because a plan must not be low.
"""

from __future__ import annotations

import torch

from deltaw.decoding.generation import MAX_CONCURRENT_SAMPLES
from deltaw.kernels.decode import PAGE_TOKENS
from deltaw.runtime.recurrent_layers import state_size
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.monitoring.generation import MAX_DATA_ANSWER_TOKENS, PROMPTS, is_checked
from deltaw.training.monitoring.samples import SAMPLES
from deltaw.training.planning.heaviest_step import LOGIT_COPIES, row_length
from deltaw.training.session import Session

# Upper bound of the number of tokens in general prompts and answers, and of the tokens in one batch of them.
GENERAL_TOKENS = 2048
GENERAL_BATCH = 1024

LASTING_BYTES = 40 << 20
# Number of tokens on which a decoder's logits are compared with the model's. The model's logits are in its data type.
# Half of them and of the decoder's are in fp32 at the same time.
COMPARED_TOKENS = 40


def decoding_bytes(session: Session, texts: int, max_length: int, batch_tokens: int | None = None) -> tuple[int, int]:
    """Return the memory of generating texts with a session's model.

    Args:
        session: Session on fake tensors.
        texts: Number of texts that are generated together.
        max_length: Maximum number of tokens in a text with its prompt.
        batch_tokens: Maximum number of tokens of all running texts. None for no limit.

    Returns:
        Bytes of weights that the decoder copies, and bytes of keys, values, states of recurrent layers, and logits.
    """
    if not texts:
        return 0, 0
    config = session.model.config.get_text_config()
    heads = config.num_attention_heads
    width = config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    running = min(MAX_CONCURRENT_SAMPLES, texts)
    pages = running * (-(-(max_length + session.method.virtual_tokens) // PAGE_TOKENS) + 1)
    if batch_tokens is not None:
        pages = min(pages, max(batch_tokens, max_length) // PAGE_TOKENS + 1)
    running = min(running, pages)
    number = 4 if session.model.dtype == torch.float32 else 2
    cache = pages * PAGE_TOKENS * 2 * key_heads * size * config.num_hidden_layers * number
    states = 4 * running * state_size(session.model)
    logits = max(LOGIT_COPIES * running, (number + 4) * COMPARED_TOKENS) * config.vocab_size
    has_int8 = any(parameter.dtype == torch.int8 for parameter in session.model.parameters())
    return config.vocab_size * width if has_int8 else 0, cache + states + logits


def num_answers(session: Session) -> int:
    """Return the largest number of answers that a run generates at one time, besides completions to train on."""
    train = session.config.train
    checked = is_checked(session)
    if not (session.task.generates_text or checked):
        return 0
    samples = SAMPLES if train.samples == "auto" else int(train.samples)
    num_general = len(DRIFT_PROMPTS) if checked or train.drift is not False or train.keep_general else 0
    return max(min(samples, len(session.data.held_out)), train.eval_answers, num_general, PROMPTS if checked else 0)


def generation_bytes(session: Session) -> tuple[int, int]:
    """Return the persistent bytes of a decoder during training, and the additional bytes while it generates.

    Texts are completions to train on, sample answers, scored answers, answers to general prompts, and the answers that
    are compared before and after training.
    """
    limits = session.generation_limits
    decoder_bytes, rollout_bytes = decoding_bytes(session, limits.num_concurrent, limits.max_length)
    checked = is_checked(session)
    texts = num_answers(session)
    if not texts:
        return decoder_bytes, rollout_bytes
    max_answer = max(MAX_ANSWER_TOKENS, MAX_DATA_ANSWER_TOKENS) if checked else MAX_ANSWER_TOKENS
    max_length = max(map(row_length, session.data.all_rows)) + max_answer
    batch_tokens = max(GENERAL_BATCH, session.batcher.tokens_per_pass)
    copied_bytes, answer_bytes = decoding_bytes(session, texts, max_length, batch_tokens)
    return decoder_bytes, max(rollout_bytes, answer_bytes if decoder_bytes else copied_bytes + answer_bytes)
