"""Streamed requests on a device of libibverbs: the same tests, and a small chaos."""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos import chaos
from tests.test_streaming import (  # noqa: F401
    test_a_broken_connection_is_rebuilt_and_others_never_notice,
    test_a_corrupted_layer_is_never_reported,
    test_a_partly_filled_block_is_sent_again_until_its_layer_is_final,
    test_a_record_of_foreign_blocks_is_refused_and_reported,
    test_a_request_from_the_offer_to_the_last_layer,
    test_an_abort_is_learned_on_both_sides_and_leaves_nothing,
    test_chunked_prefill_maps_itself_and_skips_what_is_there,
    test_closing_ends_what_is_open,
    test_several_sources_must_all_finish,
    test_the_direct_form_needs_no_offer,
)

pytestmark = pytest.mark.rdma


def test_a_small_chaos_without_faults_of_the_device(device: str) -> None:
    """Aborts, cancels, deadlines, broken connections and restarts alone."""
    counts = asyncio.run(chaos(10.0, 1, tasks=6, faults=False, device=device))
    assert counts.ends["done"] and counts.ends["aborted"]
