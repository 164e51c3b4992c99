"""What a recovery takes, in bytes: of memory, and of disk beside its result."""

from slimlm.checkpoint.skeleton import parameter_count
from slimlm.model.streamed import StreamedModel
from slimlm.recipe import RecoverStep
from slimlm.recover.teacher import at_once

SIDES = ("a", "b")  # of what is kept to go on from, by turns: one is whole while the other is written
NUMBER = 4  # bytes of one in fp32
WHOLE = 19  # of each parameter in training: itself, best, gradients of two lanes in fp32; bf16 copy; mask
LOW_RANK = 12  # of each where changes of low rank are trained: itself, itself changed, the best
PRODUCT = 8  # bytes of one of two gradients, in fp64
LIKELY = 8  # bytes of a token that is likeliest, and of its probability


def changed_count(recipe: RecoverStep, model: StreamedModel) -> int:
    """Numbers that are trained."""
    if not recipe.lora:
        return parameter_count(model.model)
    return recipe.lora * sum(map(sum, model.matrices.values()))


def remembered_bytes(recipe: RecoverStep, changed: int) -> int:
    """What an optimizer remembers of so many numbers."""
    if recipe.optimizer == "adamw":
        return 2 * NUMBER * changed
    blocks = -(-changed // (recipe.mfac_block or changed))
    return NUMBER * (recipe.mfac_gradients + 1) * changed + PRODUCT * recipe.mfac_gradients**2 * blocks


def likely_bytes(recipe: RecoverStep) -> int:
    """Of what a teacher says once."""
    assert recipe.max_seq_length is not None
    return LIKELY * recipe.teacher_top_k * recipe.num_windows * recipe.max_seq_length


def compared_bytes(recipe: RecoverStep, model: StreamedModel, dense: StreamedModel) -> int:
    """Of both models' streams behind all blocks, for the windows that go through at a time, and their differences."""
    if not recipe.hidden_weight:
        return 0
    assert recipe.max_seq_length is not None
    tokens = at_once(model.config, recipe.max_seq_length) * recipe.max_seq_length
    numbers = [len(one.blocks) * int(one.config.hidden_size) for one in (dense, model, model)]
    return NUMBER * tokens * sum(numbers)


def memory_needed(recipe: RecoverStep, model: StreamedModel, dense: StreamedModel) -> int:
    """For both models and what training one takes, without what passes between their layers, but for streams that are
    compared, which wait until all of them are there."""
    training = (LOW_RANK if recipe.lora else WHOLE) * parameter_count(model.model)
    remembered = remembered_bytes(recipe, changed_count(recipe, model))
    # M-FAC's is one piece, of which there is another while it is written, factored or read again.
    training += 2 * remembered if recipe.optimizer == "mfac" else remembered
    training += compared_bytes(recipe, model, dense)
    teacher, likely = dense.checkpoint.bytes_on_disk(), likely_bytes(recipe)
    return max(training, teacher) + likely if recipe.teacher_top_k else training + teacher


def kept_bytes(recipe: RecoverStep, model: StreamedModel) -> int:
    """On disk, so that another process can go on: weights, what the optimizer remembers, the best weights, twice; and
    what was found, or a new file beside the one that it is to replace."""
    sides, changed, parameters = len(SIDES), changed_count(recipe, model), NUMBER * parameter_count(model.model)
    remembered = remembered_bytes(recipe, changed)
    more = remembered if recipe.optimizer == "mfac" else 0
    return sides * (NUMBER * changed + remembered) + more + (sides + 1) * parameters + likely_bytes(recipe)
