"""Compare: two policies on what a pool holds, side by side, without publishing either."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.curate import check_policy, cluster_pool, evaluation_sets, pair_pool, score_pool
from flows.steps import Name, artifact_key, task_runner
from storage.pool import pool_names, read_pool
from storage.warehouse import Warehouse, WarehouseError
from tasks.curation import whatif
from tasks.curation.decontaminate import beside
from tasks.curation.policy import load_policy
from tasks.curation.signals import SignalSettings, build_signals


@flow(name="compare", task_runner=task_runner())
def compare(
    pool: Name,
    policy_a: str,
    policy_b: str,
    parameters_a: dict[str, float | str] | None = None,
    parameters_b: dict[str, float | str] | None = None,
    by: str | None = None,
    signals: SignalSettings = SignalSettings(),
    warehouse: str = "warehouse",
) -> whatif.Comparison:
    """Say how two policies, or one with other parameters, differ in what they keep of a pool, and why.

    Args:
        pool: Pool to decide on.
        policy_a: Policy file.
        policy_b: The other policy file; may be the same one.
        parameters_a: Values for the first policy's parameters.
        parameters_b: Values for the second policy's parameters.
        by: SQL expression to break the counts down by, such as language or split_part(url, '/', 3).
        signals: What to measure; what the warehouse holds is not measured again.
        warehouse: Folder or URL of the warehouse.
    """
    store = Warehouse(warehouse)
    policies = [
        load_policy(file).with_parameters(parameters or {})
        for file, parameters in ((policy_a, parameters_a), (policy_b, parameters_b))
    ]
    measures = build_signals(signals)
    for policy in policies:
        check_policy(policy, measures)
    samples = read_pool(store, pool)
    if not samples.shards:
        raise WarehouseError(
            f"{store.root}: there is no pool {pool!r} (pools: {', '.join(pool_names(store)) or 'none'}). "
            "Ingest a source into it first."
        )
    evidence = score_pool(samples, measures, warehouse=store)
    reach: dict[str, float] = {}
    for policy in policies:
        reach |= {kind: max(distance, reach.get(kind, 0)) for kind, distance in policy.reach().items()}
    held_out = {}
    for policy in policies:
        held_out |= {other.name: other for other in evaluation_sets(policy, measures, warehouse=store)}
    compared = beside(samples, held_out.values())
    evidence += cluster_pool(compared, evidence, reach, warehouse=store)
    pairs = pair_pool(compared, evidence, reach, warehouse=store)
    found = whatif.compare(
        samples, *policies, evidence, pairs, evaluation_pools=list(held_out.values()), warehouse=store, by=by
    )
    create_markdown_artifact(
        key=artifact_key("comparison", pool),
        markdown=found.markdown(),
        description=f"a: {told(policy_a, parameters_a)}; b: {told(policy_b, parameters_b)}; on {pool}",
    )
    return found


def told(policy: str, parameters: dict[str, float | str] | None) -> str:
    """A policy file with the parameters that were given for it."""
    given = ", ".join(f"{name} {value}" for name, value in (parameters or {}).items())
    return f"{policy} with {given}" if given else policy
