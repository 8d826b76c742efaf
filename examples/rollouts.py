"""What the simulators here share: who acts, and answers that are kept as they come.

A rollout takes seconds to minutes, so each one is written down as soon as it is over, one line of JSON. The
same command again reads the lines and does the rest; more tasks, more rollouts or another control add lines.
The first line says by what the answers were found; with another checkpoint or another way of drawing they
would not belong together, and that is an error.
"""
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError  # noqa: E402

# The policy; the policy with black pictures, and told another task; the simulator's own expert; chance.
WHO = ("policy", "black", "wrong", "expert", "random")


def pick_who(asked, ckpt):
    """"policy,expert" -> its names, in the order of WHO. Raises UserError."""
    names = {name.strip() for name in asked.split(",") if name.strip()}
    if not names or not names <= set(WHO):
        raise UserError(f"--who {asked}: choose from {', '.join(WHO)}, joined by commas")
    if not ckpt and names & {"policy", "black", "wrong"}:
        raise UserError("--ckpt RUN is missing: a run of stage vla. Without it there are --who expert,random")
    return [name for name in WHO if name in names]


class Answers:
    """The rollouts so far. path: a file of JSON lines; settings: what they depend on.
    Raises UserError where the file can't be continued."""

    def __init__(self, path, settings):
        self.path, self.rows = Path(path), {}
        if self.path.exists():
            self._read(settings)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(settings)

    def _read(self, settings):
        text = self.path.read_text(encoding="utf-8")
        *lines, unfinished = text.split("\n")               # whole lines end so; a killed run's last may not
        try:
            before, *rows = [json.loads(line) for line in lines]
            self.rows = {(row["who"], row["task"], row["seed"]): row for row in rows}
            changed = [name for name in settings if before.get(name) != settings[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{self.path} holds no rollouts ({type(e).__name__}: {e}). "
                            "Give another --out") from e
        if changed:
            raise UserError(f"{self.path} was begun with {changed[0]} {before.get(changed[0])}, now it is "
                            f"{settings[changed[0]]}. Give another --out, or delete it")
        if unfinished:
            os.truncate(self.path, len(text.encode()) - len(unfinished.encode()))

    def _append(self, row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def add(self, who, task, seed, success, steps, **more):
        row = {"who": who, "task": task, "seed": seed, "success": bool(success), "steps": steps} | more
        self.rows[who, task, seed] = row
        self._append(row)

    def missing(self, asked):
        """Of (who, task, seed), those that are not there yet."""
        return [key for key in asked if key not in self.rows]


class Policy:
    """A trained policy as an arm or an agent asks it: one picture and its words in, actions out.

    assistant: generate.Assistant. execute: how many actions of a chunk are done before it is asked again;
    0 = all of them. Raises UserError where the policy is one of another robot.
    """

    def __init__(self, assistant, dimensions, execute=0, key="", state_size=0):
        self.assistant, self.policy, self.execute, self.key = assistant, assistant.policy, execute, key
        if not self.policy:
            raise UserError("--ckpt is no policy: give a run that was trained by --stage vla")
        if self.policy.dimensions != dimensions:
            raise UserError(f"--ckpt: its actions have {self.policy.dimensions} dimensions, those of this "
                            f"robot {dimensions}. It is the policy of another robot")
        if self.policy.state_size not in (0, state_size):
            raise UserError(f"--ckpt: it reads a state of {self.policy.state_size} numbers, that of this "
                            f"robot has {state_size}")
        if execute > self.policy.chunk:
            raise UserError(f"--execute {execute}: this policy answers with {self.policy.chunk} actions "
                            "(--chunk of its training). Give no more than that")
        self.blind = {}                                     # answers to black pictures: always the same
        self.answers, self.actions, self.seconds = 0, 0, 0.0

    def act(self, pictures, instruction, state):
        """A list of pictures (PIL) -> (E, A), in the order in which they are to be done."""
        states, began = {"states": [state]} if self.policy.state else {}, time.process_time()
        chunk = self.assistant.act([pictures], [instruction], self.key, **states)[0]        # (K, A)
        chunk = np.asarray(chunk)[:self.execute or None]
        self.seconds += time.process_time() - began
        self.answers, self.actions = self.answers + 1, self.actions + len(chunk)
        return chunk

    def act_blind(self, sizes, instruction, state):
        """The same without eyes. sizes: of the pictures that would be shown."""
        asked = instruction, tuple(state) if self.policy.state else ()
        if asked not in self.blind:
            self.blind[asked] = self.act([Image.new("RGB", size) for size in sizes], instruction, state)
        return self.blind[asked]

    def show_speed(self):
        """CPU time, because other programs may use the cores. Drawing is not in it."""
        if self.answers:
            print(f"policy   {self.answers} answers, {1000 * self.seconds / self.answers:.1f} CPU ms each; "
                  f"{1000 * self.seconds / self.actions:.1f} an action that was done")


def rate(rows):
    """Rows of Answers -> {"done", "count", "success"}, or None if there are none."""
    done = sum(row["success"] for row in rows)
    return {"done": done, "count": len(rows), "success": done / len(rows)} if rows else None


def cell(score):
    return "-" if score is None else f"{score['done']} of {score['count']}"


def write_scores(path, scores):
    """Beside the answers, under the ending .json."""
    file = Path(path).with_suffix(".json")
    file.write_text(json.dumps(scores, indent=1))
    print(f"scores   {file}")
