"""Ask a trained model.

    python generate.py --ckpt runs/toy-finetune-x7 --image picture.png --prompt "What shape is red?"

A policy (stage vla) gets an instruction for a prompt and prints an action, with --chunk a line for each:

    python generate.py --ckpt runs/toy-vla-x7 --image picture.png --prompt "put the red circle on the star"

No --image: a text question. Several: `--image a.png b.png`, in this order. --chat asks on about the same
pictures, with all that was said before. Answers are greedy; --temperature above 0 draws them.
"""
import sys
import time
from dataclasses import dataclass
from functools import partial

from config import BadExample, Config, UserError, check_limits, knob, parse, read_config


@dataclass(frozen=True)
class GenerateConfig:
    ckpt: str = knob("", "run folder or step folder")
    image: tuple = knob((), "picture files, in the order of the question; none = text only")
    prompt: str = knob(
        "", "the question, for a vla run the instruction; empty = Describe the picture., with --chat none")
    chat: bool = knob(False, "go on asking: one question a line, an empty line ends it")
    max_new_tokens: int = knob(256, "longest answer", "tokens")
    temperature: float = knob(
        0.0, "draw each token from probabilities ~ exp(logit / temperature); 0 = take the likeliest")
    top_p: float = knob(1.0, "draw only from the likeliest tokens that have this probability together")
    seed: int = knob(0, "of the draw: the same seed on the same machine gives the same answer")
    words: bool = knob(False, "ask a vla run in words, one that learned from conversations, too")
    state: tuple = knob((), "for a vla run with --state: the numbers of the robot's state")
    unnorm_key: str = knob(
        "", "vla: the dataset whose units the action is in; needed if the policy knows several")

    def __post_init__(self):
        if not self.ckpt:
            raise UserError("--ckpt RUN is missing: a run folder that train.py wrote, "
                            "such as runs/toy-finetune-x7")
        check_limits(self, {"max_new_tokens": (1, 10 ** 5), "temperature": (0, 100), "top_p": (1e-6, 1),
                            "seed": (0, 2 ** 32 - 1)})
        if self.top_p < 1 and self.temperature == 0:
            raise UserError("--top_p draws answers, so it needs a --temperature above 0")


if __name__ == "__main__":
    cfg = parse(GenerateConfig, description="Ask a trained model.")  # before torch is imported: a fast --help

import torch
from transformers import TextStreamer

import chat
import checkpoint
import ranks
from data import Conversations
from images import Pictures, load_image_transforms, read_image
from model import load_vlm
from profiling import working_type
from prompts import TAG, find_places, load_language, tokenize


class Assistant:
    """A trained model and all that turns a question into its ids, read from a run folder or a step folder."""
    policy = None                               # how tokens become actions (actions.py); None = words

    def __init__(self, ckpt, device=None):
        self.cfg: Config = read_config(ckpt)
        self.device = torch.device(device) if device else ranks.find_device()
        # An aligned model has only learned to caption: no question stood before its captions.
        self.language = load_language(self.cfg.llm_backbone, self.cfg.prompt, self.cfg.stage == "align",
                                      self.cfg.picture_place)
        before = None
        if self.cfg.augment:                                # it has never seen a whole picture, see `distort`
            import actions
            before = actions.center
        self.transforms = load_image_transforms(self.cfg.vision_backbone, self.cfg.image_resize,
                                                self.cfg.openvla_vision, before)
        folder = checkpoint.find(ckpt)
        state = checkpoint.read_state(folder)
        if not self.language.captions:
            chat.check_same(state, self.language, ckpt, self.cfg.llm_backbone)
        if state.get("actions"):
            import actions
            self.policy = actions.ActionTokens.load(state["actions"])
        fp32 = self.device.type == "cpu" or self.cfg.precision == "fp32"    # on whatever card it was trained
        dtype = torch.float32 if fp32 else working_type("auto", self.device)
        self.model = load_vlm(self.cfg, trained=(), frozen_dtype=dtype)
        checkpoint.load_weights(self.model, folder)
        self.model.to(self.device).eval().requires_grad_(False)

    def dataset(self, path, image_dir):
        """A file of examples; ask for them by `dataset.question(i)`."""
        about = path, self.language, Pictures(image_dir, self.transforms), self.cfg.max_length
        if self.policy:
            import actions
            if actions.holds_episodes(path):
                return actions.Episodes(*about, self.policy)
        return Conversations(*about)                        # a policy may have learned to answer, too

    def example(self, question, images, earlier=(), state=None, key=""):
        """One question about already opened pictures (PIL, RGB) -> what `Conversations.question` gives.
        earlier: the turns before it, as in a file of examples; the first of the pictures stand at their tags.
        state, key: the robot's state, for a policy with --state, and whose units it is in.
        """
        tags = sum(turn["value"].count(TAG) for turn in (*earlier, {"value": question}))
        row = {"image": ["?"] * len(images),
               "conversations": [*earlier, {"from": "human",
                                            "value": (TAG + "\n") * (len(images) - tags) + question}]}
        about = row, self.language, self.transforms[0].patches, self.cfg.max_length
        if self.policy and self.policy.state:
            ids = self.policy.state_ids(state, self.policy.key(key), self.language)
            input_ids, _ = self.policy.tokenize(*about, ask=True, state=ids)
        else:
            input_ids, _ = tokenize(*about, ask=True)
        return {"input_ids": torch.tensor(input_ids),
                "images": [[transform.resized(image) for transform in self.transforms] for image in images]}

    @torch.inference_mode()
    def answer(self, examples, max_new_tokens=256, streamer=None, **options):
        """Examples (as Conversations.question gives them) -> greedy answers, a list of str.
        options: of transformers' generate, such as `drawn` gives them."""
        return [self.language.decode(ids)
                for ids in self.answer_ids(examples, max_new_tokens, streamer, **options)]

    def act(self, pictures, instructions, key="", states=None):
        """Pictures (one list of PIL RGB per robot) and instructions
        -> actions (n, K, A) in physical units, K of a chunk: in the order in which they are to be done.
        Greedy.

        key: the dataset whose units are meant; not needed where the policy knows only one.
        states: of a policy with --state: one list of numbers per robot, None where it is not known.
        """
        self.policy.check_pictures({len(images) for images in pictures})
        if self.policy.state and states is None:
            raise UserError(f"this policy was trained with --state: it needs {self.policy.state_size} "
                            "numbers, the robot's state in the units of its episodes")
        asked = zip(pictures, instructions, states or [None] * len(pictures), strict=True)
        return self.act_on([self.example(self.policy.question(text), images, (), state, key)
                            for images, text, state in asked], key)

    @torch.inference_mode()
    def act_on(self, examples, key=""):
        """Examples of one step each, as `dataset` gives them -> actions (n, K, A)."""
        key, policy = self.policy.key(key), self.policy
        return policy.decode(self.action_ids(examples).reshape(-1, policy.chunk, policy.dimensions), key)

    def action_ids(self, examples):
        """-> (n, K A) the likeliest action token, K A times, one by one or all at once. A policy can't answer
        in words: of the logits only those of the 256 actions are looked at."""
        policy, llm = self.policy, self.model.llm
        x, mask, _ = self.embed(examples, policy.length, policy.length)         # (B, T, D), (B, T)
        if policy.decoding == "parallel":
            import parallel
            slots = parallel.slots_of(self.model, policy.length)
            states = parallel.states(self.model, slots, x, mask.bool().to(self.device))     # (B, K A, D)
            return self.likeliest(states).cpu().numpy()
        positions = (mask.cumsum(1) - 1).clamp_min(0).to(self.device)   # padding on the left is not counted
        mask = None if mask.all() else mask.to(self.device)             # without one, attention is faster
        cache, ids = None, []
        for _ in range(policy.length):
            out = llm.base_model(inputs_embeds=x, attention_mask=mask, position_ids=positions,
                                 past_key_values=cache, use_cache=True)
            ids.append(self.likeliest(out.last_hidden_state[:, -1]))                        # (B,)
            x, cache, positions = llm.get_input_embeddings()(ids[-1][:, None]), out.past_key_values, (
                positions[:, -1:] + 1)
            mask = mask if mask is None else torch.cat([mask, mask[:, -1:]], 1)
        return torch.stack(ids, 1).cpu().numpy()

    def likeliest(self, states):
        """(..., D) -> (...) the likeliest of the 256 action ids."""
        first = self.policy.ids[0]
        return self.model.llm.get_output_embeddings()(states)[..., first:self.policy.end].argmax(-1) + first

    def answer_ids(self, examples, max_new_tokens=256, streamer=None, **options):
        """-> one list of new ids per example, end token included. options: for transformers' generate."""
        x, mask, left = self.embed(examples, 1, max_new_tokens)
        stop = self.language.end_id
        new = self.model.llm.generate(inputs_embeds=x, attention_mask=mask.to(self.device),
                                      max_new_tokens=left, eos_token_id=stop, pad_token_id=stop,
                                      streamer=streamer, **{"do_sample": False} | options)          # (B, new)
        answers = []
        for ids in new.tolist():
            answers.append(ids[:ids.index(stop) + 1] if stop in ids else ids)
        return answers

    def embed(self, examples, least, most):
        """-> x (B, T, D); mask (B, T), on the CPU; how many tokens may follow: `most`, or what the model has
        room for. Raises BadExample where not even `least` fit.

        Prompts are padded on the left, so that all end where the answers begin. Here the model needs a mask:
        causal attention looks to the left, where the padding now stands. In training it stands on the right.
        """
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        rows = [example["input_ids"] for example in examples]
        input_ids, mask = pad(rows), pad([torch.ones_like(row) for row in rows])                    # (B, T)
        longest = input_ids.shape[1]
        known = getattr(self.model.llm.config, "max_position_embeddings", None) or longest + most
        if longest + least > known:
            raise BadExample(f"the question takes {longest} positions, and the language model knows {known}: "
                             "no answer fits behind it. Shorten it")
        images = [image for example in examples for image in example["images"]]
        pixels = [torch.stack(views).to(self.device) for views in zip(*images)]
        patches_at, _ = find_places(input_ids, input_ids)
        x = self.model.embed(input_ids.to(self.device), pixels, patches_at.to(self.device))
        return x, mask, min(most, known - longest)


def drawn(cfg):
    """--temperature and --top_p -> options for transformers' generate; none for greedy answers."""
    if cfg.temperature == 0:
        return {}
    return {"do_sample": True, "temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": 0}     # no top-k


class Printer(TextStreamer):
    """Shows an answer while it grows. Most formats write a space between prompt and reply (see Language.gap),
    or their tokenizer does; it is no part of the answer."""

    def __init__(self, language):
        super().__init__(language.tokenizer, skip_special_tokens=True)
        self.space = " " if language.adds_space or (language.gap and not language.captions) else ""

    def on_finalized_text(self, text, stream_end=False):
        if text:                                            # the first part may be empty
            text, self.space = text.removeprefix(self.space), ""
        super().on_finalized_text(text, stream_end)


def questions(cfg):
    """--prompt, and with --chat what is typed, line by line."""
    if cfg.prompt or not cfg.chat:
        yield cfg.prompt or "Describe the picture."
    while cfg.chat:
        print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:                                        # an empty one, or the end of a file
            return
        yield line


def main(cfg):
    assistant = Assistant(cfg.ckpt)
    if cfg.words and assistant.policy:
        assistant.policy = None
    elif cfg.words:
        raise UserError(f"--words: {cfg.ckpt} is no policy and answers in words anyway. Leave the flag out")
    if cfg.chat and assistant.language.captions or (cfg.chat or cfg.temperature) and assistant.policy:
        raise UserError(f"{cfg.ckpt} is of stage {assistant.cfg.stage}: --chat is for runs that answer "
                        "questions, --temperature for all that use words (a policy: with --words)")
    for name, read in (("state", assistant.policy and assistant.policy.state),
                       ("unnorm_key", assistant.policy)):
        if getattr(cfg, name) and not read:
            raise UserError(f"--{name}: {cfg.ckpt} is no policy that reads it. Leave the flag out")
    if assistant.language.captions:
        if len(cfg.image) != 1:
            raise UserError(f"{cfg.ckpt} is an align run: it captions exactly one --image. "
                            "Run the finetune stage to ask it")
        print("(an align run captions whatever is asked; run the finetune stage to ask it)")
    images = [read_image(path) for path in cfg.image]
    if assistant.policy:
        try:
            states = [[float(number) for number in cfg.state]] if cfg.state else None
        except ValueError as e:
            raise UserError(f"--state {' '.join(cfg.state)}: give numbers, such as --state 0.5 -1") from e
        asked = [images], [next(questions(cfg))], cfg.unnorm_key, states
        assistant.act(*asked)                               # the first call is slow: memory, kernels
        began = time.perf_counter()
        actions = assistant.act(*asked)[0]                                                  # (K, A)
        print("\n".join(" ".join(f"{value:.4f}" for value in action) for action in actions),
              f"({(time.perf_counter() - began) * 1000:.0f} ms)")
        return
    torch.manual_seed(cfg.seed)
    earlier = []
    for asked in questions(cfg):
        try:
            example, show = assistant.example(asked, images, earlier), Printer(assistant.language)
            answer, = assistant.answer([example], cfg.max_new_tokens, show, **drawn(cfg))
        except BadExample as e:                             # too long, say; another question may not be
            if not cfg.chat:
                raise
            print(e)
            continue
        tags = (TAG + "\n") * len(images) * (not earlier)   # the pictures belong to the first question
        earlier += [{"from": "human", "value": tags + asked}, {"from": "gpt", "value": answer}]


if __name__ == "__main__":
    ranks.run(main, cfg)
