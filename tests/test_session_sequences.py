"""Whatever a player does in whatever order, a session shows what a session shows that was played
from the start to the same place: random sequences of steps, rewinds, forks, prompts and saves.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from safetensors.torch import load_file

from worldmodel.camera import advance
from worldmodel.errors import UserError
from worldmodel.session import Session

HISTORY = 4  # latents that may be taken back
SESSIONS = 3  # forks that are played side by side
MOTIONS = [(0.3, 0.0), (0.0, 25.0), (-0.4, -10.0), (0.0, 0.0)]  # units forward, degrees of yaw


class Take:
    """A session and its inputs, so that they can be repeated: `past` holds the motion and the
    prompt of every chunk, `kept` the number of chunks that can be taken back.
    """

    def __init__(self, session, past=(), prompt="grey", kept=0):
        self.session = session
        self.past = past
        self.prompt = prompt
        self.kept = kept


class Sequences(RuleBasedStateMachine):
    """Plays up to `SESSIONS` sessions and compares every chunk, and at the end every number that
    a save holds, with those of a session that only ever stepped.
    """

    world = None
    folder = None
    image = None

    def __init__(self):
        super().__init__()
        past = () if self.image else ((MOTIONS[-1], "grey"),)
        self.takes = [Take(self.begin(past), past, kept=len(past))]
        self.straight = {}  # sessions that only stepped, and their last frames, by their past
        self.saves = 0

    def begin(self, past):
        """A session at the start of `past`: behind its picture, or behind the first chunk."""
        prompt = "grey"
        poses = None
        if not self.image:
            motion, prompt = past[0]
            poses = self.poses(np.eye(4), motion)
        return Session(self.world, prompt, self.image, seed=3, history=HISTORY, c2w=poses)

    def poses(self, pose, motion):
        """Poses of the next chunk."""
        forward, yaw = motion
        poses = []
        for _ in range(self.world.config.rollout.chunk):
            pose = advance(pose, [0.0, 0.0, forward], yaw, 0.0)
            poses.append(pose)
        return np.stack(poses)

    def chunk_of(self, session, motion):
        """Steps on from the last pose; returns the frames."""
        last = session.poses[-1] if session.frames else np.eye(4)
        return session.step(self.poses(last, motion)).frames

    def chunks(self, session):
        """Chunks that the session has generated."""
        return (session.frames - bool(self.image)) // session.chunk

    def expected(self, past):
        """A session that was played straight along `past`, and its last frames."""
        if past not in self.straight:
            session = self.straight.pop(past[:-1], (None, None))[0] or self.begin(past)
            frames = session.first.frames
            for motion, prompt in past[self.chunks(session) :]:
                if prompt != session.prompt:
                    session.set_prompt(prompt)
                frames = self.chunk_of(session, motion)
            self.straight[past] = (session, frames)
        return self.straight[past]

    def take(self, number):
        return self.takes[number % len(self.takes)]

    @rule(number=st.integers(0, SESSIONS - 1), motion=st.sampled_from(MOTIONS), shown=st.booleans())
    def step(self, number, motion, shown):
        take = self.take(number)
        frames = self.chunk_of(take.session, motion)
        take.past += ((motion, take.prompt),)
        take.kept = min(take.kept + 1, HISTORY // take.session.chunk)
        np.testing.assert_array_equal(frames, self.expected(take.past)[1])
        if shown:  # the player's loop commits a chunk while it is shown, a faster one does not
            take.session.commit_pending()

    @rule(number=st.integers(0, SESSIONS - 1), prompt=st.sampled_from(["grey", "loud"]))
    def set_prompt(self, number, prompt):
        take = self.take(number)
        take.session.set_prompt(prompt)
        take.prompt = prompt

    @rule(number=st.integers(0, SESSIONS - 1), chunks=st.integers(1, HISTORY + 1))
    def rewind(self, number, chunks):
        take = self.take(number)
        latents = chunks * take.session.chunk
        before = take.session.frames
        if chunks > take.kept:
            with pytest.raises(UserError, match="Cannot take back"):
                take.session.rewind(latents)
            assert take.session.frames == before
            return
        take.session.rewind(latents)
        take.past = take.past[:-chunks]
        take.kept -= chunks
        assert take.session.frames == before - latents

    @rule(number=st.integers(0, SESSIONS - 1))
    def fork(self, number):
        take = self.take(number)
        if len(self.takes) < SESSIONS:
            self.takes.append(Take(take.session.fork(), take.past, take.prompt, take.kept))

    @rule(number=st.integers(0, SESSIONS - 1))
    def save_and_load(self, number):
        take = self.take(number)
        take.session = Session.load(self.save(take.session), self.world)
        take.kept = 0

    def save(self, session):
        self.saves += 1
        session.save(self.folder / f"{self.saves}")
        return self.folder / f"{self.saves}"

    @invariant()
    def every_session_knows_its_past(self):
        for take in self.takes:
            assert self.chunks(take.session) == len(take.past)
            assert take.session.rewindable == take.session.chunk * take.kept
            assert take.session.prompt == take.prompt

    def teardown(self):
        for take in self.takes:
            if take.past:
                saved = []
                for session in (take.session, self.expected(take.past)[0]):
                    session.commit_pending()
                    saved.append(load_file(self.save(session) / "session.safetensors"))
                ours, theirs = saved
                assert ours.keys() == theirs.keys()
                assert [name for name in ours if not ours[name].equal(theirs[name])] == []


@pytest.mark.parametrize(
    ("rollout", "image"),
    [
        ({"window": 4, "sinks": 0, "chunk": 1}, "grey-0"),
        ({"window": 4, "sinks": 1, "chunk": 1}, None),
        ({"window": 5, "sinks": 1, "chunk": 2}, "grey-0"),
        ({"window": 4, "sinks": 0, "chunk": 2}, None),
        ({"window": 6, "sinks": 1, "chunk": 1, "recall": 2}, "grey-0"),
    ],
    ids=lambda value: (
        "-".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)
    ),
)
@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_any_sequence_equals_a_straight_walk(tiny_world, tmp_path, rollout, image, examples):
    config = replace(tiny_world.config, rollout=replace(tiny_world.config.rollout, **rollout))

    class OfThisWorld(Sequences):
        pass

    OfThisWorld.world = replace(tiny_world, config=config)
    OfThisWorld.folder = tmp_path
    OfThisWorld.image = image
    run_state_machine_as_test(
        OfThisWorld,
        settings=settings(
            max_examples=examples,
            stateful_step_count=16,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # the first failure says enough, and shrinking takes minutes
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
