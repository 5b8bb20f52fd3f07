"""The tables, as numbered migrations. A migration that has shipped is frozen: it imports nothing of ours and never
changes; what comes later is a new function below the last."""

from sqlite_utils import Database, Migrations

migrations = Migrations("nightshift")


def _run(db: Database, script: str) -> None:
    # executescript would commit the transaction that the migration runs in.
    for statement in script.split(";"):
        if statement.strip():
            db.execute(statement)


@migrations()
def m0001_chat_by_day(db: Database) -> None:
    _run(
        db,
        """
        CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            hash BLOB NOT NULL,
            role TEXT NOT NULL CHECK (role IN ('user', 'rater', 'operator')),
            feedback TEXT NOT NULL CHECK (feedback IN ('off', 'auto', 'always')),
            label TEXT NOT NULL,
            created_at TEXT NOT NULL,
            revoked_at TEXT
        ) STRICT;

        CREATE TABLE policies (
            name TEXT PRIMARY KEY,
            parent TEXT REFERENCES policies (name),
            path TEXT NOT NULL UNIQUE,
            sha256 TEXT NOT NULL,
            base_model TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN
                ('candidate', 'rejected', 'trial', 'promoted', 'serving', 'retired', 'rolled_back')),
            created_at TEXT NOT NULL
        ) STRICT;
        CREATE UNIQUE INDEX policies_one_serves ON policies (status) WHERE status = 'serving';

        CREATE TABLE completions (
            id TEXT PRIMARY KEY,
            key_id TEXT NOT NULL REFERENCES keys (id),
            user TEXT NOT NULL,
            conversation TEXT NOT NULL,
            messages TEXT NOT NULL,
            answer TEXT NOT NULL,
            tool_calls TEXT,
            policy TEXT NOT NULL REFERENCES policies (name),
            sampling TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('complete', 'aborted', 'failed')),
            finish_reason TEXT,
            prompt_tokens INTEGER,
            completion_tokens INTEGER,
            first_token_ms REAL,
            total_ms REAL NOT NULL,
            created_at TEXT NOT NULL
        ) STRICT;
        CREATE INDEX completions_by_key ON completions (key_id, created_at);

        CREATE TABLE comparisons (
            id TEXT PRIMARY KEY,
            key_id TEXT NOT NULL REFERENCES keys (id),
            a TEXT NOT NULL REFERENCES completions (id),
            b TEXT NOT NULL REFERENCES completions (id) CHECK (a <> b),
            kind TEXT NOT NULL CHECK (kind IN ('same_policy', 'trial', 'active', 'identical_check')),
            swapped INTEGER NOT NULL CHECK (swapped IN (0, 1)),
            created_at TEXT NOT NULL,
            expires_at TEXT NOT NULL,
            rater TEXT REFERENCES keys (id),
            rater_since TEXT,
            rater_until TEXT
        ) STRICT;
        CREATE INDEX comparisons_by_key ON comparisons (key_id, created_at);
        CREATE INDEX comparisons_by_rater ON comparisons (rater) WHERE rater IS NOT NULL;

        CREATE TABLE votes (
            id TEXT PRIMARY KEY,
            comparison_id TEXT NOT NULL REFERENCES comparisons (id),
            key_id TEXT NOT NULL REFERENCES keys (id),
            choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'tie', 'both_bad')),
            comment TEXT,
            decided_ms INTEGER NOT NULL,
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            UNIQUE (comparison_id, key_id)
        ) STRICT;

        CREATE TABLE vote_history (
            vote_id TEXT NOT NULL REFERENCES votes (id),
            choice TEXT NOT NULL,
            comment TEXT,
            cast_at TEXT NOT NULL,
            replaced_at TEXT NOT NULL
        ) STRICT;
        CREATE INDEX vote_history_by_vote ON vote_history (vote_id);

        CREATE TABLE audit (
            id INTEGER PRIMARY KEY,
            at TEXT NOT NULL,
            actor TEXT NOT NULL,
            action TEXT NOT NULL,
            subject TEXT NOT NULL
        ) STRICT;
        """,
    )


@migrations()
def m0002_learn_by_night(db: Database) -> None:
    _run(
        db,
        """
        CREATE TABLE runs (
            id TEXT PRIMARY KEY,
            status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
            requested_by TEXT NOT NULL,
            config TEXT NOT NULL,
            stage TEXT,
            pid INTEGER,
            heartbeat_at TEXT,
            cancel_requested_at TEXT,
            error TEXT,
            created_at TEXT NOT NULL,
            started_at TEXT,
            ended_at TEXT
        ) STRICT;
        CREATE UNIQUE INDEX runs_one_active ON runs ((1)) WHERE status IN ('queued', 'running');

        CREATE TABLE run_metrics (
            run_id TEXT NOT NULL REFERENCES runs (id),
            name TEXT NOT NULL,
            step INTEGER NOT NULL,
            value REAL,
            PRIMARY KEY (run_id, name, step)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE run_votes (
            run_id TEXT NOT NULL REFERENCES runs (id),
            vote_id TEXT NOT NULL REFERENCES votes (id),
            choice TEXT NOT NULL,
            split TEXT NOT NULL CHECK (split IN ('train', 'judge', 'held_out')),
            weight REAL NOT NULL,
            PRIMARY KEY (run_id, vote_id)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE reward_models (
            id TEXT PRIMARY KEY,
            run_id TEXT NOT NULL REFERENCES runs (id),
            path TEXT NOT NULL UNIQUE,
            sha256 TEXT NOT NULL,
            metrics TEXT NOT NULL,
            created_at TEXT NOT NULL
        ) STRICT;

        CREATE TABLE trusted_pairs (
            id TEXT PRIMARY KEY,
            digest TEXT NOT NULL UNIQUE,
            prompt TEXT NOT NULL,
            chosen TEXT NOT NULL,
            rejected TEXT NOT NULL,
            created_at TEXT NOT NULL
        ) STRICT;

        ALTER TABLE policies ADD COLUMN run_id TEXT REFERENCES runs (id);
        ALTER TABLE policies ADD COLUMN reward_model TEXT REFERENCES reward_models (id);
        ALTER TABLE policies ADD COLUMN metrics TEXT NOT NULL DEFAULT '{}';
        """,
    )


@migrations()
def m0003_find_a_users_answers(db: Database) -> None:
    _run(
        db,
        """
        CREATE INDEX completions_by_user ON completions (user, created_at);
        CREATE INDEX comparisons_by_a ON comparisons (a);
        CREATE INDEX comparisons_by_time ON comparisons (created_at);
        """,
    )


@migrations()
def m0004_remember_who_held_a_pair(db: Database) -> None:
    _run(
        db,
        """
        CREATE TABLE holds (
            comparison_id TEXT NOT NULL REFERENCES comparisons (id),
            key_id TEXT NOT NULL REFERENCES keys (id),
            since TEXT NOT NULL,
            until TEXT NOT NULL,
            PRIMARY KEY (comparison_id, key_id)
        ) STRICT;
        CREATE INDEX holds_by_key ON holds (key_id, until);
        INSERT INTO holds SELECT id, rater, rater_since, rater_until FROM comparisons WHERE rater IS NOT NULL;

        DROP INDEX comparisons_by_rater;
        ALTER TABLE comparisons DROP COLUMN rater;
        ALTER TABLE comparisons DROP COLUMN rater_since;
        ALTER TABLE comparisons DROP COLUMN rater_until;
        """,
    )


@migrations()
def m0005_swap_without_a_seam(db: Database) -> None:
    _run(
        db,
        """
        CREATE TABLE leases (
            name TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            until TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE schedules (
            id TEXT PRIMARY KEY,
            kind TEXT NOT NULL CHECK (kind IN ('cron', 'every', 'votes')),
            spec TEXT NOT NULL,
            timezone TEXT NOT NULL,
            paused INTEGER NOT NULL CHECK (paused IN (0, 1)),
            created_by TEXT NOT NULL,
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            since TEXT NOT NULL,
            last_due_at TEXT,
            last_run TEXT REFERENCES runs (id),
            problem TEXT
        ) STRICT;

        CREATE TABLE duels (
            id TEXT PRIMARY KEY,
            kind TEXT NOT NULL CHECK (kind IN ('trial', 'watch')),
            challenger TEXT NOT NULL REFERENCES policies (name),
            incumbent TEXT NOT NULL REFERENCES policies (name),
            threshold REAL NOT NULL,
            budget INTEGER NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('running', 'won', 'lost', 'undecided', 'ended')),
            wins INTEGER NOT NULL DEFAULT 0,
            losses INTEGER NOT NULL DEFAULT 0,
            ties INTEGER NOT NULL DEFAULT 0,
            e_value REAL NOT NULL DEFAULT 1,
            e_mirrored REAL NOT NULL DEFAULT 1,
            rate_low REAL NOT NULL DEFAULT 0,
            rate_high REAL NOT NULL DEFAULT 1,
            reason TEXT,
            started_at TEXT NOT NULL,
            ended_at TEXT
        ) STRICT;
        CREATE UNIQUE INDEX duels_one_runs ON duels (status) WHERE status = 'running';

        CREATE TABLE duel_curve (
            duel_id TEXT NOT NULL REFERENCES duels (id),
            votes INTEGER NOT NULL,
            e_value REAL NOT NULL,
            e_mirrored REAL NOT NULL,
            rate_low REAL NOT NULL,
            rate_high REAL NOT NULL,
            at TEXT NOT NULL,
            PRIMARY KEY (duel_id, votes)
        ) STRICT, WITHOUT ROWID;

        ALTER TABLE comparisons ADD COLUMN duel_id TEXT REFERENCES duels (id);
        CREATE INDEX comparisons_by_duel ON comparisons (duel_id) WHERE duel_id IS NOT NULL;

        CREATE TABLE swaps (
            id TEXT PRIMARY KEY,
            policy TEXT NOT NULL REFERENCES policies (name),
            replaced TEXT REFERENCES policies (name),
            actor TEXT NOT NULL,
            reason TEXT NOT NULL,
            requested_at TEXT NOT NULL,
            flipped_at TEXT,
            drained_at TEXT,
            problem TEXT
        ) STRICT;
        CREATE INDEX swaps_by_policy ON swaps (policy, requested_at);
        ALTER TABLE policies ADD COLUMN problem TEXT;

        CREATE INDEX votes_by_time ON votes (created_at);
        """,
    )


@migrations()
def m0006_faces(db: Database) -> None:
    _run(
        db,
        """
        CREATE TABLE sessions (
            hash BLOB PRIMARY KEY,
            key_id TEXT NOT NULL REFERENCES keys (id),
            created_at TEXT NOT NULL,
            expires_at TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE sign_in_codes (
            hash BLOB PRIMARY KEY,
            key_id TEXT NOT NULL REFERENCES keys (id),
            expires_at TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE conversations (
            id TEXT PRIMARY KEY,
            key_id TEXT NOT NULL REFERENCES keys (id),
            title TEXT NOT NULL,
            messages TEXT NOT NULL,
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL
        ) STRICT;
        CREATE INDEX conversations_by_key ON conversations (key_id, updated_at);

        CREATE TABLE gold_questions (
            id TEXT PRIMARY KEY,
            vote_id TEXT NOT NULL UNIQUE,
            key_id TEXT NOT NULL REFERENCES keys (id),
            pair_id TEXT NOT NULL REFERENCES trusted_pairs (id),
            chosen_side TEXT NOT NULL CHECK (chosen_side IN ('a', 'b')),
            since TEXT NOT NULL,
            until TEXT NOT NULL,
            choice TEXT CHECK (choice IN ('a', 'b', 'tie', 'both_bad')),
            comment TEXT,
            decided_ms INTEGER,
            created_at TEXT,
            updated_at TEXT,
            UNIQUE (key_id, pair_id)
        ) STRICT;

        ALTER TABLE holds ADD COLUMN passed_at TEXT;
        CREATE INDEX votes_by_key ON votes (key_id, created_at);
        """,
    )


@migrations()
def m0007_whose_votes_are_left_out(db: Database) -> None:
    _run(
        db,
        """
        CREATE TABLE quarantines (
            key_id TEXT PRIMARY KEY REFERENCES keys (id),
            status TEXT NOT NULL CHECK (status IN ('suspected', 'confirmed', 'released')),
            reason TEXT NOT NULL,
            run_id TEXT REFERENCES runs (id),
            since TEXT NOT NULL,
            ruled_by TEXT,
            ruled_at TEXT,
            CHECK ((status = 'suspected') = (ruled_at IS NULL))
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE run_raters (
            run_id TEXT NOT NULL REFERENCES runs (id),
            key_id TEXT NOT NULL REFERENCES keys (id),
            votes INTEGER NOT NULL,
            agreed INTEGER NOT NULL,
            reliability REAL NOT NULL,
            PRIMARY KEY (run_id, key_id)
        ) STRICT, WITHOUT ROWID;
        """,
    )


@migrations()
def m0008_find_without_searching(db: Database) -> None:
    _run(
        db,
        """
        ALTER TABLE comparisons ADD COLUMN user TEXT NOT NULL DEFAULT '';
        UPDATE comparisons SET user = (SELECT completions.user FROM completions WHERE completions.id = a);
        CREATE INDEX comparisons_by_user ON comparisons (user, created_at);

        ALTER TABLE comparisons ADD COLUMN waits INTEGER NOT NULL DEFAULT 1 CHECK (waits IN (0, 1));
        UPDATE comparisons SET waits = 0 WHERE id IN (SELECT comparison_id FROM votes)
            OR a IN (SELECT id FROM completions WHERE messages = '[]');
        CREATE INDEX comparisons_waiting ON comparisons (created_at) WHERE waits = 1;

        CREATE INDEX completions_by_policy ON completions (policy, id);
        """,
    )
