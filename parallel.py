"""--decode parallel: all actions of a chunk in one forward (OpenVLA-OFT, arXiv 2502.19645, section IV-A).

Token by token, the second token of an answer waits for the first: K A forwards for K actions of A dimensions.
Here the prompt is followed by K A slots, learned embeddings, one for each token of the answer:

    prompt    sees itself and what stands before it, as ever, and so no slot: its states do not depend on them
    slots     see the prompt and each other, also the ones behind; what comes out at a slot is its own token,
              not the next one, with the same 256 bins and the same loss as token by token

A token is chosen without knowing which ones its neighbors became, only what their states are. There is no
end token: the number of slots is fixed.

Slots follow each row's own prompt, and padding follows the slots, so their positions are those of tokens.
They lie in the projector, which makes inputs for the language model of what is no text, and which each
checkpoint of a policy holds.

Shapes: B examples, T positions, D LLM width, K A slots.
"""
import torch
from torch import nn

from config import UserError

SLOT = -300                                 # stands in input_ids where a slot will be; no vocabulary entry


def add_slots(model, shape):
    """Gives a VLM places for slots, to be filled from a checkpoint or by `begin`. shape: K A, D.

    At first they are a buffer: what loads a policy keeps them, but only stage vla trains them."""
    table = model.llm.get_input_embeddings().weight
    if len(shape) != 2 or shape[1] != table.shape[1]:
        raise UserError(f"projector.slots is {tuple(shape)}, but the language model has a width of "
                        f"{table.shape[1]}")
    model.projector.register_buffer("slots", torch.zeros(shape, device=table.device))


def slots_of(model, count):
    """Its slots. Raises UserError if they are not so many."""
    found = len(getattr(model.projector, "slots", ()))
    if found != count:
        raise UserError(f"the checkpoint has {found} slots, but --decode parallel needs {count} here, one "
                        "for each dimension of each action of a --chunk")
    return model.projector.slots


@torch.no_grad()
def begin(model, count, cfg):
    """For a run that trains: the slots of --ckpt go on, or new ones begin, as large as words are."""
    if "projector" not in cfg.trained:
        raise UserError(f"--trains {','.join(cfg.trained)}: --decode parallel needs projector there, "
                        "because its slots train with it")
    if not hasattr(model.projector, "slots"):
        table = model.llm.get_input_embeddings().weight
        add_slots(model, (count, table.shape[1]))
        drawn = torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(cfg.seed))
        model.projector.slots.copy_(drawn * table.std().cpu())
    slots = slots_of(model, count)
    del model.projector.slots
    model.projector.slots = nn.Parameter(slots)


def fill(slots, x, input_ids):
    """Slots in their places among the embeddings -> x (B, T, D), and what the language model must be told:
    what each position sees, and where it stands (of its own, OPT would take that from a mask of rows).

    Nothing is looked up by a mask, whose size a GPU would have to be waited for.
    """
    here = input_ids == SLOT                                                                # (B, T)
    number = (here.cumsum(1) - 1).clamp(0, len(slots) - 1)                                  # (B, T)
    positions = torch.arange(here.shape[1], device=here.device).expand(here.shape)          # (B, T)
    return torch.where(here[..., None], slots.to(x.dtype)[number], x), {
        "attention_mask": seen(here), "position_ids": positions}


def seen(here, real=None):
    """Which positions each position sees, (B, 1, T, T) bool: causal, but slots see each other.

    here: where slots stand, (B, T). real: where no padding stands; needed only if it stands on the left.
    """
    causal = torch.ones(here.shape[1], here.shape[1], dtype=torch.bool, device=here.device).tril()
    mask = causal | (here[:, :, None] & here[:, None, :])                                   # (B, T, T)
    if real is not None:
        # Padding sees itself, or the softmax over nothing would give NaN.
        mask = mask & real[:, None, :] | torch.eye(here.shape[1], dtype=torch.bool, device=here.device)
    return mask[:, None]


def states(model, slots, x, real):
    """Prompts, padded on the left, (B, T, D), and where none is padding (B, T) -> what comes out at the slots
    behind them, (B, K A, D)."""
    ones = torch.ones_like(real[:, :1]).expand(-1, len(slots))                              # (B, K A)
    here, real = (torch.cat([mask, ones], 1) for mask in (torch.zeros_like(real), real))
    x = torch.cat([x, slots.to(x.dtype).expand(len(x), -1, -1)], 1)
    positions = (real.cumsum(1) - 1).clamp_min(0)                       # padding on the left is not counted
    out = model.llm.base_model(inputs_embeds=x, attention_mask=seen(here, real), position_ids=positions,
                               use_cache=False)
    return out.last_hidden_state[:, -len(slots):]
