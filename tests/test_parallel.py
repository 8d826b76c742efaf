"""parallel.py: what slots see, where their losses stand, and runs that act by them."""
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_actions import base, robot, train_robot                                           # noqa: F401
from test_model import (IGNORE, LLMS, VISION, a_step, example, saved_llm,               # noqa: F401
                        world_of_one)
from test_train import assert_same_curve, run_train, weights, world                        # noqa: F401
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import parallel
from data import collate
from generate import Assistant
from model import VLM, VisionBackbone, load_llm, make_projector
from parallel import SLOT

COUNT = 6                                                   # slots: two actions of three dimensions


def with_slots(llm, seed=0):
    torch.manual_seed(seed)
    width = llm.get_input_embeddings().embedding_dim
    model = VLM(VisionBackbone([VISION["siglip"]()]), make_projector("gelu-mlp", 32, width), llm).eval()
    parallel.begin(model, COUNT, SimpleNamespace(trained=("projector",), seed=0))
    torch.nn.init.normal_(model.projector.slots, std=0.5)
    return model


def asked(i, targets=None):
    """Example i's prompt, of another length for each i, and slots; `targets`: ids that they are to give."""
    prompt = example(i)
    targets = torch.arange(10 + i, 10 + i + COUNT) if targets is None else torch.tensor(targets)
    tail = torch.tensor([SLOT] * COUNT + [2])
    labels = torch.cat([torch.full((len(prompt["input_ids"]) + 1,), IGNORE), targets])
    return prompt | {"input_ids": torch.cat([prompt["input_ids"], tail]), "labels": labels}


@torch.no_grad()
def states_of(model, examples):
    """-> states (B, T, D), and those at the slots (B, COUNT, D)."""
    batch = collate(examples)
    x = model.embed(batch["input_ids"], batch["pixel_values"])
    x, seen = parallel.fill(model.projector.slots, x, batch["input_ids"])
    states = model.llm.base_model(inputs_embeds=x, use_cache=False, **seen).last_hidden_state
    return states, states[batch["input_ids"] == SLOT].view(len(examples), COUNT, -1)


every_llm = pytest.mark.parametrize("kind", LLMS)


@every_llm
def test_the_states_of_a_prompt_do_not_depend_on_the_slots(kind, tmp_path):
    model = with_slots(load_llm(saved_llm(LLMS[kind](), tmp_path)))
    many = [asked(i) for i in (0, 5, 2)]
    lengths = [len(each["input_ids"]) - COUNT - 1 for each in many]
    before, at_slots = states_of(model, many)
    torch.nn.init.normal_(model.projector.slots, std=5.0)
    after, other = states_of(model, many)
    for one, two, length in zip(before, after, lengths):
        assert torch.equal(one[:length], two[:length])
    assert ((at_slots - other).abs().amax(-1) > 1e-3).all()
    # And they are those of plain causal attention.
    batch = collate([example(i) for i in (0, 5, 2)])
    with torch.no_grad():
        plain = model.llm.base_model(inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"]),
                                     use_cache=False).last_hidden_state
    for one, two, length in zip(before, plain, lengths):
        assert_close(one[:length], two[:length], rtol=1e-4, atol=1e-5)      # another kernel


@every_llm
def test_each_slot_sees_the_prompt_and_all_slots(kind, tmp_path):
    model = with_slots(load_llm(saved_llm(LLMS[kind](), tmp_path)))
    _, before = states_of(model, [asked(3)])

    def changed(examples):
        return (states_of(model, examples)[1] != before).any(-1)[0].tolist()

    assert not any(changed([asked(3)]))
    for slot in (0, COUNT - 1):
        kept = model.projector.slots.detach().clone()
        with torch.no_grad():
            model.projector.slots[slot] = -kept[slot]
        assert changed([asked(3)]) == [True] * COUNT
        model.projector.slots.data.copy_(kept)
    other = asked(3)
    other["input_ids"][len(other["input_ids"]) - COUNT - 4] = 50            # the third word from the end
    assert changed([other]) == [True] * COUNT


@every_llm
def test_rows_of_a_batch_are_as_alone_and_training_is_as_acting(kind, tmp_path):
    """Padded on the right as in training, on the left as for acting, or not at all."""
    model = with_slots(load_llm(saved_llm(LLMS[kind](), tmp_path)))
    which = (0, 5, 2, 7)
    _, batched = states_of(model, [asked(i) for i in which])
    for i, row in zip(which, batched):
        assert_close(states_of(model, [asked(i)])[1][0], row, rtol=1e-4, atol=1e-5)
    assistant = object.__new__(Assistant)
    assistant.device, assistant.model = torch.device("cpu"), model
    assistant.policy = SimpleNamespace(length=COUNT, decoding="parallel", ids=list(range(20, 60)), end=60)
    with torch.no_grad():
        x, real, _ = assistant.embed([example(i) for i in which], COUNT, COUNT)
        left = parallel.states(model, model.projector.slots, x, real.bool())
        assert_close(left, batched, rtol=1e-4, atol=1e-5)
        want = model.llm.get_output_embeddings()(batched)[..., 20:60].argmax(-1) + 20
        assert assistant.action_ids([example(i) for i in which]).tolist() == want.tolist()
        for i, ids in zip(which, want.tolist()):
            assert assistant.action_ids([example(i)]).tolist() == [ids]


@every_llm
def test_a_slot_learns_its_own_token(kind, tmp_path):
    model = with_slots(load_llm(saved_llm(LLMS[kind](), tmp_path)))
    model.set_trained(("projector", "llm"))
    model.eval()
    targets = [[11, 12, 13, 14, 15, 16], [21, 22, 23, IGNORE, IGNORE, IGNORE], [31, 32, 33, 34, 35, 36]]
    many = [asked(i, wanted) for i, wanted in zip((0, 5, 2), targets)]
    batch = collate(many)
    loss, guessed = model(batch["input_ids"], batch["labels"], batch["pixel_values"], batch["places"])
    logits = model.llm.get_output_embeddings()(states_of(model, many)[1])                   # (3, COUNT, V)
    wanted = torch.tensor(targets)
    want = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")   # it skips IGNORE
    assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(guessed, logits[wanted != IGNORE].argmax(-1)) and len(guessed) == 15
    loss.backward()
    assert (model.projector.slots.grad.abs().amax(1) > 0).all()


@every_llm
def test_a_step_with_slots_waits_for_nothing(kind, tmp_path):
    model = with_slots(load_llm(saved_llm(LLMS[kind](), tmp_path)))
    model.set_trained(("projector", "llm"))
    found, = a_step(model, [collate([asked(0), asked(5)]), collate([asked(2), asked(7)])])[:1]
    assert found == {}


def test_a_text_in_between_is_read_as_without_slots(tmp_path):
    """Of a policy that also trains on conversations: the same loss, and no gradient for the slots. Without
    pictures None, not zeros: AdamW's momentum would move the slots by them, and weight decay shrink them."""
    model = with_slots(load_llm(saved_llm(LLMS["Llama, Vicuna"](), tmp_path)))
    model.set_trained(("projector", "llm"))
    batch = collate([example(i) for i in range(4)])
    loss, _ = model.eval()(batch["input_ids"], batch["labels"], batch["pixel_values"], batch["places"])
    loss.backward()
    assert not model.projector.slots.grad.any()
    model.zero_grad()
    batch_of_texts = collate([example(i, pictures=0) for i in range(4)])
    model(*(batch_of_texts[name] for name in ("input_ids", "labels", "pixel_values", "places")))[0].backward()
    assert all(parameter.grad is None for parameter in model.projector.parameters())
    del model.projector.slots
    want, _ = model(batch["input_ids"], batch["labels"], batch["pixel_values"], batch["places"])
    assert_close(loss, want, rtol=1e-5, atol=1e-5)


# -- runs ----------------------------------------------------------------------------------------------------

PARALLEL = "--decode", "parallel", "--chunk", "2"
CASES = {"two ranks": (2, ("--per_device_batch_size", "2")),
         "recomputing": (1, ("--gradient_checkpointing",)),
         "cut among the ranks": (2, ("--shard", "all"))}


@pytest.fixture(scope="module")
def acting(robot, base, tmp_path_factory):                  # noqa: F811
    return train_robot(robot, base, tmp_path_factory.mktemp("parallel"), *PARALLEL, "--max_steps", "20")


@pytest.mark.parametrize("case", CASES)
def test_a_policy_in_parallel_trains_the_same(case, robot, base, acting, tmp_path):         # noqa: F811
    ranks, flags = CASES[case]
    got, run, _ = train_robot(robot, base, tmp_path, *PARALLEL, "--max_steps", "20", *flags, ranks=ranks)
    assert_same_curve(got, acting[0])
    assert weights(run).keys() == weights(acting[1]).keys()


def test_it_learns_and_acts_alone_as_in_a_batch(robot, acting):                             # noqa: F811
    metrics, run, printed = acting
    # 48 steps in chunks of 2 actions of 2 dimensions. The last of four steps has one action. No end tokens.
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert all(line["tokens"] % 2 == 0 and 16 <= line["tokens"] <= 32 for line in metrics)
    assert "[4 slots]>>" in " ".join(printed.split())         # lines end at 100 columns
    slots = weights(run)["projector.slots"]
    assert slots.shape == (4, 128)
    assistant = Assistant(run)
    data = assistant.dataset(robot / "lamp.json", robot / "images")
    seen = [[Image.open(robot / "images" / f"{e}_0.png").convert("RGB")] for e in (0, 5, 11)]
    told = ["show it", "show it to the left of it", "show"]                                 # of three lengths
    actions = assistant.act(seen, told)
    assert actions.shape == (3, 2, 2)
    for i in range(3):
        assert (assistant.act(seen[i:i + 1], told[i:i + 1])[0] == actions[i]).all()
    # Acting is what training computed: its guesses for a batch, which is padded on the other side.
    batch = collate([data[4 * e] for e in (0, 5, 11)])
    with torch.no_grad():
        _, guessed = assistant.model(batch["input_ids"], batch["labels"], batch["pixel_values"])
    guessed = guessed.view(3, 4).numpy()
    acts = (assistant.policy.ids[0] <= guessed) & (guessed < assistant.policy.end)
    assert acts.sum() >= 9                                  # after 20 steps some guesses are still words
    got = assistant.action_ids([data.question(4 * e) for e in (0, 5, 11)])
    assert (got == guessed)[acts].all()


def test_it_continues_bit_for_bit(robot, base, acting, tmp_path):                           # noqa: F811
    flags = (*PARALLEL, "--max_steps", "20", "--save_every", "15")
    train_robot(robot, base, tmp_path, *flags)
    (tmp_path / "r" / "step-00000020").rename(tmp_path / "aside")
    _, run, _ = train_robot(robot, base, tmp_path, *flags)
    got, want = weights(run), weights(acting[1])
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_slots_train_beside_adapters(robot, base, tmp_path):                                # noqa: F811
    flags = (*PARALLEL, "--trains", "projector,llm", "--lora_rank", "4", "--max_steps", "4")
    _, run, _ = train_robot(robot, base, tmp_path / "1", *flags)
    assert weights(run)["projector.slots"].shape == (4, 128)
    _, other, _ = train_robot(robot, base, tmp_path / "2", *flags, "--learning_rate", "0")
    assert (weights(run)["projector.slots"] != weights(other)["projector.slots"]).any(1).all()
    assert Assistant(run).act([[Image.new("RGB", (96, 96))]], ["show it"]).shape == (1, 2, 2)


def test_slots_go_on_stay_or_are_refused(robot, base, acting, tmp_path):                    # noqa: F811
    slots = weights(acting[1])["projector.slots"]

    def go_on(name, *flags, **how):
        _, run, printed = train_robot(robot, acting[1], tmp_path / name, "--learning_rate", "0",
                                      "--max_steps", "1", *flags, **how)
        return printed if "ok" in how else weights(run).get("projector.slots")

    assert torch.equal(go_on("on", *PARALLEL), slots)
    assert go_on("tokens", "--chunk", "2") is None          # token by token needs none
    printed = go_on("other", "--decode", "parallel", "--chunk", "3", ok=False)
    assert "the checkpoint has 4 slots, but --decode parallel needs 6 here" in printed
    printed = go_on("frozen", *PARALLEL, "--trains", "llm", ok=False)
    assert "--trains llm: --decode parallel needs projector there" in printed


def test_a_policy_that_learns_to_talk_again_keeps_its_slots(acting, world, tmp_path):       # noqa: F811
    _, run, _ = run_train(world, tmp_path, "--ckpt", str(acting[1]), "--max_steps", "3", "--learning_rate",
                          "1e-3")
    assert torch.equal(weights(run)["projector.slots"], weights(acting[1])["projector.slots"])
    state = json.loads((run / "step-00000003" / "state.json").read_text())
    assert "actions" not in state and Assistant(run).policy is None
