"""What Prometheus may read. Each app has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nightshift_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self.request_s = Histogram(
            "nightshift_request_seconds",
            "Time to the last byte of a response.",
            ["route"],
            buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=self.registry,
        )
        self.first_token_s = Histogram(
            "nightshift_first_token_seconds",
            "Time to the first token of a streamed answer.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.completions = Counter(
            "nightshift_completions", "Answers, by how they ended.", ["status"], registry=self.registry
        )
        self.comparisons = Counter("nightshift_comparisons", "Comparisons shown.", registry=self.registry)
        self.unseen = Counter(
            "nightshift_unseen_answers",
            "Answers drawn for an active pair or for best of n beyond those that a plain pair or answer takes.",
            registry=self.registry,
        )
        self.scorings = Counter(
            "nightshift_scorings",
            "Requests whose answers the reward model was to score, by what became of it.",
            ["outcome"],
            registry=self.registry,
        )
        self.scored_by = Gauge(
            "nightshift_reward_model", "1 for the reward model that scores answers.", ["id"], registry=self.registry
        )
        self.votes = Counter("nightshift_votes", "Votes acknowledged.", ["choice"], registry=self.registry)
        self.lost_writes = Counter(
            "nightshift_lost_writes", "Answers given that could not be logged.", registry=self.registry
        )
        self.engine_ready = Gauge(
            "nightshift_engine_ready", "1 while the engine gets traffic.", ["engine"], registry=self.registry
        )
        self.engine_in_flight = Gauge(
            "nightshift_engine_in_flight", "Requests running on the engine.", ["engine"], registry=self.registry
        )
        self.serving = Gauge(
            "nightshift_serving_policy", "1 for the policy that new requests take.", ["policy"], registry=self.registry
        )
        self.swaps = Counter("nightshift_swaps", "Swaps that this process made.", registry=self.registry)
        self.duel_e_value = Gauge(
            "nightshift_duel_e_value",
            "Evidence that the challenger of the duel that runs is better than the policy that serves.",
            ["kind", "challenger", "incumbent"],
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
