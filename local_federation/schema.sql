-- The federation's state. Columns carry the names of the wire; JSON is kept as text.
-- Times are ISO-8601 UTC where an answer shows them, epoch seconds (REAL) where they are reckoned with.

CREATE TABLE IF NOT EXISTS setting (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE IF NOT EXISTS neuron (
    neuronId TEXT PRIMARY KEY,
    registration TEXT NOT NULL,
    status TEXT NOT NULL,
    isActive INTEGER NOT NULL,
    registeredAt TEXT NOT NULL,
    updatedAt TEXT NOT NULL,
    heardAt REAL NOT NULL,
    slaTargets TEXT NOT NULL
);

CREATE TABLE IF NOT EXISTS heartbeat (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    neuronId TEXT NOT NULL,
    receivedAt REAL NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS heartbeat_by_neuron ON heartbeat (neuronId, id);

CREATE TABLE IF NOT EXISTS command (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    commandId TEXT NOT NULL UNIQUE,
    neuronId TEXT NOT NULL,
    commandType TEXT NOT NULL,
    commandData TEXT NOT NULL,
    priority INTEGER NOT NULL,
    status TEXT NOT NULL,
    issuedBy TEXT NOT NULL,
    issuedAt TEXT NOT NULL,
    sentAt TEXT,
    acknowledgedAt TEXT,
    completedAt TEXT,
    failedAt TEXT,
    timeoutAt TEXT,
    response TEXT,
    errorMessage TEXT,
    retryCount INTEGER NOT NULL,
    maxRetries INTEGER NOT NULL,
    metadata TEXT
);
CREATE INDEX IF NOT EXISTS command_by_neuron ON command (neuronId, status);

CREATE TABLE IF NOT EXISTS analytics (
    neuronId TEXT NOT NULL,
    date TEXT NOT NULL,
    reportedAt TEXT NOT NULL,
    report TEXT NOT NULL,
    PRIMARY KEY (neuronId, date)
);
