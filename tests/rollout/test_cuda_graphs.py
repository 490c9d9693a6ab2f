"""CUDA graphs as far as a CPU can test them: buckets, and padded tables that give the same hidden states."""

from __future__ import annotations

import dataclasses

import torch

from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.cuda_graphs import bucket, empty_tables, fill, key_of
from fastvst.rollout.decode import forward_tables
from hf_parity import make_models, make_sample, small_config


def test_buckets_are_large_enough_and_waste_little():
    for rows in range(1, 600):
        size = bucket(rows)
        assert size >= rows and (rows < 3 or size <= 2 * rows) and (rows < 64 or size <= 1.25 * rows)
    assert bucket(256) == 256


def test_padded_tables_give_the_same_hidden_states():
    model = make_models(small_config(), torch.float64, seed=3)[0]
    engine = Engine(model, memory=1 << 20, page_size=4)
    for seed, (length, n) in enumerate([(7, 3), (30, 1), (2, 1)]):
        engine.add(make_sample(small_config(), [("text", length)], seed=seed), SamplingParams(n=n, max_tokens=40))
    for _ in range(9):
        engine.step()
    pool = engine.scheduler.pool
    batch = engine.scheduler.schedule().batch
    tables = batch.tables
    key = key_of(tables)
    assert key[0] == 8 > len(batch) and key[3] == 4
    static = empty_tables(key, torch.device("cpu"))
    before = {f.name: getattr(static, f.name) for f in dataclasses.fields(static)}
    with torch.no_grad():
        forward_tables(model, pool, static)  # padding only
        expected = forward_tables(model, pool, tables, batch.decode_pieces())
        keys = pool.keys[:, 1:].clone()
        for _ in range(2):
            fill(static, tables)
            found = forward_tables(model, pool, static)
    assert all(getattr(static, name) is value for name, value in before.items()), "they are filled in place"
    torch.testing.assert_close(found[: len(batch)], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pool.keys[:, 1:], keys, rtol=1e-12, atol=1e-12)
    assert found.isfinite().all(), "padding rows stay finite"
    assert static.group_offsets.tolist() == [0, 3, 4, 5, 6, 7, 8, 8, 8]
