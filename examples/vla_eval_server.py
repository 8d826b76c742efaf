"""A policy behind vla-eval, a harness for many simulators: LIBERO, SIMPLER, CALVIN and others.

    pip install vla-eval==0.8.0
    python examples/vla_eval_server.py --ckpt runs/my-libero --gripper libero --cameras agentview,wrist
    vla-eval run --config configs/benchmarks/libero/spatial.yaml        # in another terminal; needs Docker

    python examples/vla_eval_server.py --ckpt runs/toy-vla-x7 --toy 100         # no Docker, no GPU

The last line lets the harness run the toy robot: the same tables as `python toy/robot.py --rollouts 100`, but
every picture and every action goes through vla-eval's protocol. Its question and answer:

    {"images": {name: (H, W, 3) uint8}, "task_description": text, "states": numbers, if they were asked for}
    {"actions": (A,) or (K, A)}

LIBERO's pictures come upright, so train on upright ones (--turn 180 of examples/hdf5_to_episodes.py).
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import vla_eval
from PIL import Image
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import serve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, check_limits, knob, parse  # noqa: E402
from toy import robot  # noqa: E402

KINDS = ["unseen layouts", "unseen pairs"]                  # as toy/robot.py calls its tables


@dataclass(frozen=True)
class ServerConfig:
    ckpt: str = knob("", "run folder or step folder of a policy")
    host: str = knob("127.0.0.1", "address to listen on; this one is reached from this machine only")
    port: int = knob(8000, "port to listen on")
    cameras: str = knob("", "the simulator's cameras joined by commas, in the order that the policy learned; "
                            "empty = the simulator's order")
    gripper: Literal["as_it_is", "libero"] = knob(
        "as_it_is", "the last number of an action. libero: the policy learned 1 open, 0 close (--gripper "
                    "libero of the converters); the simulator gets -1 open, 1 close")
    execute: int = knob(1, "of several actions in an answer, how many are done before it is asked again",
                        "actions")
    batch_size: int = knob(1, "observations of parallel simulators that are answered at once")
    unnorm_key: str = knob("", "the dataset whose units are meant; needed if the policy knows several")
    toy: int = knob(0, "serve nothing; let the harness run so many tables of the toy robot of each kind")

    def __post_init__(self):
        if not self.ckpt:
            raise UserError("--ckpt RUN is missing: a run of stage vla, such as runs/toy-vla-x7")
        check_limits(self, {"port": (0, 65535), "execute": (1, 1000), "batch_size": (1, 1000),
                            "toy": (0, 10 ** 6)})


class PolicyServer(PredictModelServer):
    """assistant: generate.Assistant, or what acts as it does."""

    def __init__(self, assistant, cfg):
        # Of a chunk (K, A) the base class sends `chunk_size` actions one after the other, then it asks again.
        super().__init__(chunk_size=cfg.execute, max_batch_size=cfg.batch_size)
        self.assistant, self.cfg = assistant, cfg

    def predict_batch(self, observations, contexts):
        """n observations, of as many simulators -> n times {"actions": (A,) or (K, A)}."""
        pictures = [self.pictures(observation["images"]) for observation in observations]
        texts = [observation["task_description"] for observation in observations]
        states = {}
        if getattr(self.assistant.policy, "state", False):
            states = {"states": [np.ravel(observation["states"]).tolist() for observation in observations]}
        actions = np.array(self.assistant.act(pictures, texts, self.cfg.unnorm_key, **states), np.float64)
        if self.cfg.gripper == "libero":
            actions[..., -1] = 1 - 2 * actions[..., -1]
        return [{"actions": of} for of in actions]

    def pictures(self, images):
        """The simulator's pictures, by name -> those that the policy knows, in its order."""
        names = [name.strip() for name in self.cfg.cameras.split(",") if name.strip()]
        names = names or list(images)[:self.assistant.policy.pictures]
        if not set(names) <= set(images):
            raise UserError(f"--cameras {self.cfg.cameras}: the simulator sends {', '.join(images)}")
        return [Image.fromarray(np.asarray(images[name], np.uint8)) for name in names]

    def get_observation_params(self):
        """What the simulator must be asked to send along."""
        wanted = {"send_wrist_image": (self.assistant.policy.pictures or 1) > 1,
                  "send_state": bool(getattr(self.assistant.policy, "state", False))}
        return {name: True for name, is_wanted in wanted.items() if is_wanted}

    # The harness compares what both sides say about rotations, units and grippers. A checkpoint does not know
    # what its numbers mean; whoever recorded them does.
    def get_action_spec(self):
        return {}

    def get_observation_spec(self):
        return {}


class ToyRobot(StepBenchmark):
    """The toy robot as a simulator of the harness. Table i is that of `robot.rollout`."""
    render_backends = frozenset({"gpu", "cpu"})

    @classmethod
    def configure_render(cls, mode):
        return {}                                           # it draws with pillow

    def get_tasks(self):
        return [{"name": kind, "suite": "toy"} for kind in KINDS]

    def reset(self, task):
        self.rng = random.Random(1000 + task["episode_idx"])
        self.table = robot.Table(robot.random_task(self.rng, task["name"]), self.rng)

    def step(self, action):
        self.table.step(robot.inexact(np.asarray(action["actions"], np.float64), self.rng))
        return StepResult(obs=None, reward=0.0, done=self.table.success(), info={})

    def make_obs(self, raw_obs, task):
        return {"images": {"table": np.asarray(self.table.picture())},
                "task_description": str(self.table.task), "states": self.table.state()}

    def get_step_result(self, step_result):
        return {"success": self.table.success()}

    def get_metadata(self):
        return {"max_steps": robot.MOST_STEPS}

    def get_action_spec(self):
        return {}

    def get_observation_spec(self):
        return {}


def run_toy(server, tables):
    """Serves and runs the harness in this process -> {kind: list of bool, whether the table was done}."""
    config = {"benchmarks": [{"benchmark": "examples.vla_eval_server:ToyRobot", "episodes_per_task": tables}]}
    result, = vla_eval.evaluate(server, config, docker=False, no_save=True)
    if result["num_errors"]:
        raise UserError(f"{result['num_errors']} episodes ended in an error, which stands above")
    return {task["task"]: [episode["metrics"]["success"] for episode in task["episodes"]]
            for task in result["tasks"]}


def main(cfg):
    from generate import Assistant
    assistant = Assistant(cfg.ckpt)
    if not assistant.policy:
        raise UserError(f"--ckpt {cfg.ckpt} is no policy: give a run that was trained by --stage vla")
    server = PolicyServer(assistant, cfg)
    if not cfg.toy:
        print(f"ws://{cfg.host}:{cfg.port} waits for vla-eval run", flush=True)
        return serve(server, host=cfg.host, port=cfg.port)
    for kind, done in run_toy(server, cfg.toy).items():
        print(f"{kind:<16} {np.mean(done):7.1%}   of {len(done)}")


if __name__ == "__main__":
    cfg = parse(ServerConfig, description=__doc__.split("\n\n")[0])
    import ranks                                            # behind the flags: it imports torch
    ranks.run(main, cfg)
