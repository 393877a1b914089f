BEGIN TRANSACTION;
CREATE TABLE commands (
        command_id TEXT NOT NULL,
        digest TEXT NOT NULL,
        type TEXT NOT NULL,
        data TEXT NOT NULL,
        priority INTEGER NOT NULL,
        timeout_at REAL,
        state TEXT NOT NULL,
        runs INTEGER NOT NULL DEFAULT 0,
        outcome TEXT,
        result TEXT,
        sequence INTEGER,
        deliveries INTEGER NOT NULL DEFAULT 0,
        next_delivery REAL NOT NULL DEFAULT 0,
        received_at REAL NOT NULL,
        changed_at REAL NOT NULL,
        PRIMARY KEY (command_id, digest)
    );
INSERT INTO "commands" VALUES('v1-received','5d217893b6df0529abcd6213016e96e9','run_task','{"task": "effect", "params": {"n": 1}}',5,NULL,'received',0,NULL,NULL,NULL,0,0.0,1.7954800052434332371e+09,1.7954800052434332371e+09);
INSERT INTO "commands" VALUES('v1-acknowledged','5d217893b6df0529abcd6213016e96e9','run_task','{"task": "effect", "params": {"n": 1}}',5,NULL,'acknowledged',0,NULL,NULL,NULL,0,0.0,1.79548000524462366108e+09,1.79548000524530863763e+09);
INSERT INTO "commands" VALUES('v1-running','5d217893b6df0529abcd6213016e96e9','run_task','{"task": "effect", "params": {"n": 1}}',5,NULL,'running',1,NULL,NULL,NULL,0,0.0,1.79548000524624919889e+09,1.79548000524724507337e+09);
INSERT INTO "commands" VALUES('v1-finished','5d217893b6df0529abcd6213016e96e9','run_task','{"task": "effect", "params": {"n": 1}}',5,NULL,'finished',0,'succeeded','{"success": true, "response": {"outcome": "succeeded", "result": {"value": 2}}}',1,0,0.0,1.79548000524777793878e+09,1.79548000524896025657e+09);
INSERT INTO "commands" VALUES('v1-reported','5d217893b6df0529abcd6213016e96e9','run_task','{"task": "effect", "params": {"n": 1}}',5,NULL,'reported',0,'succeeded','{"success": true, "response": {"outcome": "succeeded", "result": {"value": 2}}}',2,0,0.0,1.7954800052847754955e+09,1.79548000529246211051e+09);
INSERT INTO "commands" VALUES('v1-reported-2','5d217893b6df0529abcd6213016e96e9','run_task','{"task": "effect", "params": {"n": 1}}',5,NULL,'reported',0,'rejected','{"success": false, "response": {"outcome": "rejected"}, "errorMessage": "no"}',3,0,0.0,1.79548000529316496851e+09,1.79548000530477428436e+09);
INSERT INTO "commands" VALUES('v1-aside','5d217893b6df0529abcd6213016e96e9','run_task','{"task": "effect", "params": {"n": 1}}',5,NULL,'aside',0,'succeeded','{"success": true, "response": {"outcome": "succeeded", "result": {"value": 2}}}',4,0,0.0,1.79548000531245803826e+09,1.7954800053232338429e+09);
CREATE TABLE days (
        day TEXT PRIMARY KEY, totals TEXT NOT NULL, report TEXT, closed INTEGER NOT NULL DEFAULT 0
    );
INSERT INTO "days" VALUES('2026-11-23','{"day": "2026-11-23", "successful": 2, "failed": 0, "invalid": 0, "dataProcessed": 0, "responseTimeSum": 3.0, "responseTimes": {"alpha": 0.01, "zeros": 0, "ignored": 0, "buckets": [0, 1, 35, 1], "min": 1.0, "max": 2.0}}',NULL,0);
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "settings" VALUES('config_update','{"heartbeat_interval": 30}');
CREATE INDEX commands_by_state ON commands (state, sequence);
CREATE INDEX commands_by_sequence ON commands (sequence);
CREATE INDEX commands_by_change ON commands (changed_at);
COMMIT;
PRAGMA user_version = 1;
