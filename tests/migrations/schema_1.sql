-- A journal of schema 1, as 0.1.0 wrote it: a run in each state, one parked.  Never change it.
PRAGMA application_id = 1635020653;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE backups (
	run TEXT NOT NULL, 
	n INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	backup_id TEXT, 
	outcome TEXT NOT NULL, 
	reason TEXT, 
	bytes_added INTEGER, 
	bytes_processed INTEGER, 
	files_processed INTEGER, 
	CONSTRAINT fk_backups_run FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_backups_run UNIQUE (run, n)
)
 STRICT

;
INSERT INTO "backups" VALUES('0000000000000005',0,'/tank/a','id','completed',NULL,7,NULL,NULL);
INSERT INTO "backups" VALUES('0000000000000006',0,'/tank/a','id','completed',NULL,7,NULL,NULL);
INSERT INTO "backups" VALUES('0000000000000007',0,'/tank/a','id','completed',NULL,7,NULL,NULL);
CREATE TABLE journals (
	uuid TEXT NOT NULL, 
	machine_id TEXT NOT NULL, 
	created_at INTEGER NOT NULL, 
	CONSTRAINT pk_journals PRIMARY KEY (uuid)
)
 STRICT

;
INSERT INTO "journals" VALUES('7c9e6679-7425-40de-944b-e07fc1f90ae7','machine',1785000000000000);
CREATE TABLE moves (
	run TEXT NOT NULL, 
	rev INTEGER NOT NULL, 
	at INTEGER NOT NULL, 
	event TEXT NOT NULL, 
	source TEXT NOT NULL, 
	dest TEXT NOT NULL, 
	reason TEXT, 
	CONSTRAINT fk_moves_run FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_moves_run UNIQUE (run, rev)
)
 STRICT

;
INSERT INTO "moves" VALUES('0000000000000002',1,1785000000007000,'snapshots_taken','planned','snapshotted',NULL);
INSERT INTO "moves" VALUES('0000000000000003',1,1785000000012000,'snapshots_taken','planned','snapshotted',NULL);
INSERT INTO "moves" VALUES('0000000000000003',2,1785000000016000,'volumes_mounted','snapshotted','mounted',NULL);
INSERT INTO "moves" VALUES('0000000000000004',1,1785000000021000,'snapshots_taken','planned','snapshotted',NULL);
INSERT INTO "moves" VALUES('0000000000000004',2,1785000000025000,'volumes_mounted','snapshotted','mounted',NULL);
INSERT INTO "moves" VALUES('0000000000000004',3,1785000000026000,'client_started','mounted','backing-up',NULL);
INSERT INTO "moves" VALUES('0000000000000005',1,1785000000031000,'snapshots_taken','planned','snapshotted',NULL);
INSERT INTO "moves" VALUES('0000000000000005',2,1785000000035000,'volumes_mounted','snapshotted','mounted',NULL);
INSERT INTO "moves" VALUES('0000000000000005',3,1785000000036000,'client_started','mounted','backing-up',NULL);
INSERT INTO "moves" VALUES('0000000000000005',4,1785000000039000,'client_ended','backing-up','unmounting',NULL);
INSERT INTO "moves" VALUES('0000000000000006',1,1785000000044000,'snapshots_taken','planned','snapshotted',NULL);
INSERT INTO "moves" VALUES('0000000000000006',2,1785000000048000,'volumes_mounted','snapshotted','mounted',NULL);
INSERT INTO "moves" VALUES('0000000000000006',3,1785000000049000,'client_started','mounted','backing-up',NULL);
INSERT INTO "moves" VALUES('0000000000000006',4,1785000000051000,'client_ended','backing-up','unmounting',NULL);
INSERT INTO "moves" VALUES('0000000000000007',1,1785000000057000,'snapshots_taken','planned','snapshotted',NULL);
INSERT INTO "moves" VALUES('0000000000000007',2,1785000000061000,'volumes_mounted','snapshotted','mounted',NULL);
INSERT INTO "moves" VALUES('0000000000000007',3,1785000000062000,'client_started','mounted','backing-up',NULL);
INSERT INTO "moves" VALUES('0000000000000007',4,1785000000064000,'client_ended','backing-up','unmounting',NULL);
INSERT INTO "moves" VALUES('0000000000000007',5,1785000000071000,'cleaned_up','unmounting','destroyed',NULL);
CREATE TABLE runs (
	id TEXT NOT NULL, 
	job TEXT NOT NULL, 
	label TEXT NOT NULL, 
	state TEXT NOT NULL, 
	rev INTEGER NOT NULL, 
	outcome TEXT, 
	cleanup TEXT, 
	reason TEXT, 
	attempts INTEGER NOT NULL, 
	"plan" TEXT NOT NULL, 
	client TEXT NOT NULL, 
	repository TEXT, 
	moment_at INTEGER, 
	started_at INTEGER NOT NULL, 
	ended_at INTEGER, 
	boot_id TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	bytes_added INTEGER, 
	bytes_processed INTEGER, 
	files_processed INTEGER, 
	CONSTRAINT pk_runs PRIMARY KEY (id), 
	CONSTRAINT ck_runs_state CHECK (state IN ('planned', 'snapshotted', 'mounted', 'backing-up', 'unmounting', 'destroyed')), 
	CONSTRAINT ck_runs_outcome CHECK (outcome IN ('completed', 'partial', 'failed', 'rolled-back')), 
	CONSTRAINT ck_runs_cleanup CHECK (cleanup = 'parked'), 
	CONSTRAINT ck_runs_ended CHECK ((state = 'destroyed') = (ended_at IS NOT NULL))
)
 STRICT

;
INSERT INTO "runs" VALUES('0000000000000001','job-planned','planned','planned',0,NULL,NULL,NULL,0,'{"client": {"command": ["true"], "cwd": "/", "environment": [], "extra": [], "name": "command", "repository": null, "secrets": [], "version": ""}, "excludes": [], "grace_s": 60, "job": "job-planned", "keep_for_s": 0, "keep_snapshots": false, "label": "planned", "layout": "namespace", "live_paths": [], "notes": [], "retries": 0, "root": "", "run": "0000000000000001", "targets": ["/tank/a"], "time_limit_s": 0, "volumes": [{"guid": "guid of tank/a", "kind": "zfs", "mountpoint": "/tank/a", "name": "tank/a", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a@atomtx-0000000000000001"}, {"guid": "guid of tank/a/b", "kind": "zfs", "mountpoint": "/tank/a/b", "name": "tank/a/b", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a/b@atomtx-0000000000000001"}]}','command',NULL,NULL,1785000000001000,NULL,'boot',42,NULL,NULL,NULL);
INSERT INTO "runs" VALUES('0000000000000002','job-snapshotted','snapshotted','snapshotted',1,NULL,NULL,NULL,0,'{"client": {"command": ["true"], "cwd": "/", "environment": [], "extra": [], "name": "command", "repository": null, "secrets": [], "version": ""}, "excludes": [], "grace_s": 60, "job": "job-snapshotted", "keep_for_s": 0, "keep_snapshots": false, "label": "snapshotted", "layout": "namespace", "live_paths": [], "notes": [], "retries": 0, "root": "", "run": "0000000000000002", "targets": ["/tank/a"], "time_limit_s": 0, "volumes": [{"guid": "guid of tank/a", "kind": "zfs", "mountpoint": "/tank/a", "name": "tank/a", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a@atomtx-0000000000000002"}, {"guid": "guid of tank/a/b", "kind": "zfs", "mountpoint": "/tank/a/b", "name": "tank/a/b", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a/b@atomtx-0000000000000002"}]}','command',NULL,1785000000000000,1785000000003000,NULL,'boot',42,NULL,NULL,NULL);
INSERT INTO "runs" VALUES('0000000000000003','job-mounted','mounted','mounted',2,NULL,NULL,NULL,1,'{"client": {"command": ["true"], "cwd": "/", "environment": [], "extra": [], "name": "command", "repository": null, "secrets": [], "version": ""}, "excludes": [], "grace_s": 60, "job": "job-mounted", "keep_for_s": 0, "keep_snapshots": false, "label": "mounted", "layout": "namespace", "live_paths": [], "notes": [], "retries": 0, "root": "", "run": "0000000000000003", "targets": ["/tank/a"], "time_limit_s": 0, "volumes": [{"guid": "guid of tank/a", "kind": "zfs", "mountpoint": "/tank/a", "name": "tank/a", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a@atomtx-0000000000000003"}, {"guid": "guid of tank/a/b", "kind": "zfs", "mountpoint": "/tank/a/b", "name": "tank/a/b", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a/b@atomtx-0000000000000003"}]}','command',NULL,1785000000000000,1785000000008000,NULL,'boot',42,NULL,NULL,NULL);
INSERT INTO "runs" VALUES('0000000000000004','job-backing-up','backing-up','backing-up',3,NULL,NULL,NULL,1,'{"client": {"command": ["true"], "cwd": "/", "environment": [], "extra": [], "name": "command", "repository": null, "secrets": [], "version": ""}, "excludes": [], "grace_s": 60, "job": "job-backing-up", "keep_for_s": 0, "keep_snapshots": false, "label": "backing-up", "layout": "namespace", "live_paths": [], "notes": [], "retries": 0, "root": "", "run": "0000000000000004", "targets": ["/tank/a"], "time_limit_s": 0, "volumes": [{"guid": "guid of tank/a", "kind": "zfs", "mountpoint": "/tank/a", "name": "tank/a", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a@atomtx-0000000000000004"}, {"guid": "guid of tank/a/b", "kind": "zfs", "mountpoint": "/tank/a/b", "name": "tank/a/b", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a/b@atomtx-0000000000000004"}]}','command',NULL,1785000000000000,1785000000017000,NULL,'boot',42,NULL,NULL,NULL);
INSERT INTO "runs" VALUES('0000000000000005','job-unmounting','unmounting','unmounting',4,'completed',NULL,NULL,1,'{"client": {"command": ["true"], "cwd": "/", "environment": [], "extra": [], "name": "command", "repository": null, "secrets": [], "version": ""}, "excludes": [], "grace_s": 60, "job": "job-unmounting", "keep_for_s": 0, "keep_snapshots": true, "label": "unmounting", "layout": "namespace", "live_paths": [], "notes": [], "retries": 0, "root": "", "run": "0000000000000005", "targets": ["/tank/a"], "time_limit_s": 0, "volumes": [{"guid": "guid of tank/a", "kind": "zfs", "mountpoint": "/tank/a", "name": "tank/a", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a@atomtx-0000000000000005"}, {"guid": "guid of tank/a/b", "kind": "zfs", "mountpoint": "/tank/a/b", "name": "tank/a/b", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a/b@atomtx-0000000000000005"}]}','command',NULL,1785000000000000,1785000000027000,NULL,'boot',42,7,NULL,NULL);
INSERT INTO "runs" VALUES('0000000000000006','job-parked','parked','unmounting',5,'completed','parked','busy',1,'{"client": {"command": ["true"], "cwd": "/", "environment": [], "extra": [], "name": "command", "repository": null, "secrets": [], "version": ""}, "excludes": [], "grace_s": 60, "job": "job-parked", "keep_for_s": 0, "keep_snapshots": false, "label": "parked", "layout": "namespace", "live_paths": [], "notes": [], "retries": 0, "root": "", "run": "0000000000000006", "targets": ["/tank/a"], "time_limit_s": 0, "volumes": [{"guid": "guid of tank/a", "kind": "zfs", "mountpoint": "/tank/a", "name": "tank/a", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a@atomtx-0000000000000006"}, {"guid": "guid of tank/a/b", "kind": "zfs", "mountpoint": "/tank/a/b", "name": "tank/a/b", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a/b@atomtx-0000000000000006"}]}','command',NULL,1785000000000000,1785000000040000,NULL,'boot',42,7,NULL,NULL);
INSERT INTO "runs" VALUES('0000000000000007','job-destroyed','destroyed','destroyed',5,'completed',NULL,NULL,1,'{"client": {"command": ["true"], "cwd": "/", "environment": [], "extra": [], "name": "command", "repository": null, "secrets": [], "version": ""}, "excludes": [], "grace_s": 60, "job": "job-destroyed", "keep_for_s": 0, "keep_snapshots": false, "label": "destroyed", "layout": "namespace", "live_paths": [], "notes": [], "retries": 0, "root": "", "run": "0000000000000007", "targets": ["/tank/a"], "time_limit_s": 0, "volumes": [{"guid": "guid of tank/a", "kind": "zfs", "mountpoint": "/tank/a", "name": "tank/a", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a@atomtx-0000000000000007"}, {"guid": "guid of tank/a/b", "kind": "zfs", "mountpoint": "/tank/a/b", "name": "tank/a/b", "pool": "tank", "pool_guid": "11", "snapshot": "tank/a/b@atomtx-0000000000000007"}]}','command',NULL,1785000000000000,1785000000053000,1785000000070000,'boot',42,7,NULL,NULL);
CREATE TABLE steps (
	id INTEGER NOT NULL, 
	run TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	kind TEXT NOT NULL, 
	payload TEXT NOT NULL, 
	compensates INTEGER, 
	intended_at INTEGER NOT NULL, 
	ended_at INTEGER, 
	outcome TEXT, 
	detail TEXT, 
	CONSTRAINT pk_steps PRIMARY KEY (id), 
	CONSTRAINT ck_steps_outcome CHECK (outcome IN ('done', 'failed', 'not-needed', 'parked')), 
	CONSTRAINT ck_steps_ended CHECK ((outcome IS NULL) = (ended_at IS NULL)), 
	CONSTRAINT fk_steps_compensates FOREIGN KEY(compensates) REFERENCES steps (id) ON DELETE CASCADE, 
	CONSTRAINT fk_steps_run FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE
)
 STRICT

;
INSERT INTO "steps" VALUES(1,'0000000000000001',0,'take-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000001", "snapshots": ["tank/a@atomtx-0000000000000001", "tank/a/b@atomtx-0000000000000001"]}',NULL,1785000000002000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(2,'0000000000000001',0,'destroy-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000001", "snapshots": ["tank/a@atomtx-0000000000000001", "tank/a/b@atomtx-0000000000000001"]}',1,1785000000002000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(3,'0000000000000002',0,'take-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000002", "snapshots": ["tank/a@atomtx-0000000000000002", "tank/a/b@atomtx-0000000000000002"]}',NULL,1785000000004000,1785000000005000,'done',NULL);
INSERT INTO "steps" VALUES(4,'0000000000000002',0,'destroy-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000002", "snapshots": ["tank/a@atomtx-0000000000000002", "tank/a/b@atomtx-0000000000000002"]}',3,1785000000004000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(5,'0000000000000002',0,'hold-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000002", "tank/a/b@atomtx-0000000000000002"], "tag": "atomtx-0000000000000002"}',NULL,1785000000006000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(6,'0000000000000002',0,'release-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000002", "tank/a/b@atomtx-0000000000000002"], "tag": "atomtx-0000000000000002"}',5,1785000000006000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(7,'0000000000000003',0,'take-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000003", "snapshots": ["tank/a@atomtx-0000000000000003", "tank/a/b@atomtx-0000000000000003"]}',NULL,1785000000009000,1785000000010000,'done',NULL);
INSERT INTO "steps" VALUES(8,'0000000000000003',0,'destroy-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000003", "snapshots": ["tank/a@atomtx-0000000000000003", "tank/a/b@atomtx-0000000000000003"]}',7,1785000000009000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(9,'0000000000000003',0,'hold-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000003", "tank/a/b@atomtx-0000000000000003"], "tag": "atomtx-0000000000000003"}',NULL,1785000000011000,1785000000013000,'done',NULL);
INSERT INTO "steps" VALUES(10,'0000000000000003',0,'release-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000003", "tank/a/b@atomtx-0000000000000003"], "tag": "atomtx-0000000000000003"}',9,1785000000011000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(11,'0000000000000003',1,'mount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000003"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000003"}], "root": ""}',NULL,1785000000014000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(12,'0000000000000003',1,'unmount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000003"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000003"}], "root": ""}',11,1785000000014000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(13,'0000000000000003',1,'run-client','{"client": "command", "commands": [["true"]], "cwd": "/"}',NULL,1785000000015000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(14,'0000000000000003',1,'end-client','{"client": "command"}',13,1785000000015000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(15,'0000000000000004',0,'take-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000004", "snapshots": ["tank/a@atomtx-0000000000000004", "tank/a/b@atomtx-0000000000000004"]}',NULL,1785000000018000,1785000000019000,'done',NULL);
INSERT INTO "steps" VALUES(16,'0000000000000004',0,'destroy-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000004", "snapshots": ["tank/a@atomtx-0000000000000004", "tank/a/b@atomtx-0000000000000004"]}',15,1785000000018000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(17,'0000000000000004',0,'hold-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000004", "tank/a/b@atomtx-0000000000000004"], "tag": "atomtx-0000000000000004"}',NULL,1785000000020000,1785000000022000,'done',NULL);
INSERT INTO "steps" VALUES(18,'0000000000000004',0,'release-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000004", "tank/a/b@atomtx-0000000000000004"], "tag": "atomtx-0000000000000004"}',17,1785000000020000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(19,'0000000000000004',1,'mount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000004"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000004"}], "root": ""}',NULL,1785000000023000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(20,'0000000000000004',1,'unmount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000004"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000004"}], "root": ""}',19,1785000000023000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(21,'0000000000000004',1,'run-client','{"client": "command", "commands": [["true"]], "cwd": "/"}',NULL,1785000000024000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(22,'0000000000000004',1,'end-client','{"client": "command"}',21,1785000000024000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(23,'0000000000000005',0,'take-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000005", "snapshots": ["tank/a@atomtx-0000000000000005", "tank/a/b@atomtx-0000000000000005"]}',NULL,1785000000028000,1785000000029000,'done',NULL);
INSERT INTO "steps" VALUES(24,'0000000000000005',0,'destroy-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000005", "snapshots": ["tank/a@atomtx-0000000000000005", "tank/a/b@atomtx-0000000000000005"]}',23,1785000000028000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(25,'0000000000000005',0,'hold-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000005", "tank/a/b@atomtx-0000000000000005"], "tag": "atomtx-0000000000000005"}',NULL,1785000000030000,1785000000032000,'done',NULL);
INSERT INTO "steps" VALUES(26,'0000000000000005',0,'release-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000005", "tank/a/b@atomtx-0000000000000005"], "tag": "atomtx-0000000000000005"}',25,1785000000030000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(27,'0000000000000005',1,'mount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000005"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000005"}], "root": ""}',NULL,1785000000033000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(28,'0000000000000005',1,'unmount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000005"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000005"}], "root": ""}',27,1785000000033000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(29,'0000000000000005',1,'run-client','{"client": "command", "commands": [["true"]], "cwd": "/"}',NULL,1785000000034000,1785000000037000,'done',NULL);
INSERT INTO "steps" VALUES(30,'0000000000000005',1,'end-client','{"client": "command"}',29,1785000000034000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(31,'0000000000000005',1,'keep-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000005", "snapshots": ["tank/a@atomtx-0000000000000005", "tank/a/b@atomtx-0000000000000005"]}',NULL,1785000000038000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(32,'0000000000000006',0,'take-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000006", "snapshots": ["tank/a@atomtx-0000000000000006", "tank/a/b@atomtx-0000000000000006"]}',NULL,1785000000041000,1785000000042000,'done',NULL);
INSERT INTO "steps" VALUES(33,'0000000000000006',0,'destroy-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000006", "snapshots": ["tank/a@atomtx-0000000000000006", "tank/a/b@atomtx-0000000000000006"]}',32,1785000000041000,1785000000052000,'parked','busy');
INSERT INTO "steps" VALUES(34,'0000000000000006',0,'hold-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000006", "tank/a/b@atomtx-0000000000000006"], "tag": "atomtx-0000000000000006"}',NULL,1785000000043000,1785000000045000,'done',NULL);
INSERT INTO "steps" VALUES(35,'0000000000000006',0,'release-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000006", "tank/a/b@atomtx-0000000000000006"], "tag": "atomtx-0000000000000006"}',34,1785000000043000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(36,'0000000000000006',1,'mount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000006"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000006"}], "root": ""}',NULL,1785000000046000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(37,'0000000000000006',1,'unmount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000006"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000006"}], "root": ""}',36,1785000000046000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(38,'0000000000000006',1,'run-client','{"client": "command", "commands": [["true"]], "cwd": "/"}',NULL,1785000000047000,1785000000050000,'done',NULL);
INSERT INTO "steps" VALUES(39,'0000000000000006',1,'end-client','{"client": "command"}',38,1785000000047000,NULL,NULL,NULL);
INSERT INTO "steps" VALUES(40,'0000000000000007',0,'take-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000007", "snapshots": ["tank/a@atomtx-0000000000000007", "tank/a/b@atomtx-0000000000000007"]}',NULL,1785000000054000,1785000000055000,'done',NULL);
INSERT INTO "steps" VALUES(41,'0000000000000007',0,'destroy-snapshots','{"pool": "tank", "pool_guid": "11", "run": "0000000000000007", "snapshots": ["tank/a@atomtx-0000000000000007", "tank/a/b@atomtx-0000000000000007"]}',40,1785000000054000,1785000000065000,'done',NULL);
INSERT INTO "steps" VALUES(42,'0000000000000007',0,'hold-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000007", "tank/a/b@atomtx-0000000000000007"], "tag": "atomtx-0000000000000007"}',NULL,1785000000056000,1785000000058000,'done',NULL);
INSERT INTO "steps" VALUES(43,'0000000000000007',0,'release-snapshots','{"pool": "tank", "pool_guid": "11", "snapshots": ["tank/a@atomtx-0000000000000007", "tank/a/b@atomtx-0000000000000007"], "tag": "atomtx-0000000000000007"}',42,1785000000056000,1785000000066000,'done',NULL);
INSERT INTO "steps" VALUES(44,'0000000000000007',1,'mount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000007"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000007"}], "root": ""}',NULL,1785000000059000,1785000000067000,'done',NULL);
INSERT INTO "steps" VALUES(45,'0000000000000007',1,'unmount-volumes','{"directories": [], "mounts": [{"mountpoint": "/tank/a", "source": "tank/a@atomtx-0000000000000007"}, {"mountpoint": "/tank/a/b", "source": "tank/a/b@atomtx-0000000000000007"}], "root": ""}',44,1785000000059000,1785000000068000,'done',NULL);
INSERT INTO "steps" VALUES(46,'0000000000000007',1,'run-client','{"client": "command", "commands": [["true"]], "cwd": "/"}',NULL,1785000000060000,1785000000063000,'done',NULL);
INSERT INTO "steps" VALUES(47,'0000000000000007',1,'end-client','{"client": "command"}',46,1785000000060000,1785000000069000,'done',NULL);
CREATE TABLE volumes (
	run TEXT NOT NULL, 
	n INTEGER NOT NULL, 
	kind TEXT NOT NULL, 
	pool TEXT NOT NULL, 
	pool_guid TEXT NOT NULL, 
	name TEXT NOT NULL, 
	guid TEXT NOT NULL, 
	mountpoint TEXT NOT NULL, 
	snapshot TEXT NOT NULL, 
	snapshot_guid TEXT, 
	createtxg TEXT, 
	is_empty INTEGER, 
	CONSTRAINT ck_volumes_kind CHECK (kind IN ('zfs')), 
	CONSTRAINT ck_volumes_identity CHECK ((snapshot_guid IS NULL) = (createtxg IS NULL)), 
	CONSTRAINT fk_volumes_run FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_volumes_run UNIQUE (run, n)
)
 STRICT

;
INSERT INTO "volumes" VALUES('0000000000000001',0,'zfs','tank','11','tank/a','guid of tank/a','/tank/a','tank/a@atomtx-0000000000000001',NULL,NULL,NULL);
INSERT INTO "volumes" VALUES('0000000000000001',1,'zfs','tank','11','tank/a/b','guid of tank/a/b','/tank/a/b','tank/a/b@atomtx-0000000000000001',NULL,NULL,NULL);
INSERT INTO "volumes" VALUES('0000000000000002',0,'zfs','tank','11','tank/a','guid of tank/a','/tank/a','tank/a@atomtx-0000000000000002','9223372036854775808','101',NULL);
INSERT INTO "volumes" VALUES('0000000000000002',1,'zfs','tank','11','tank/a/b','guid of tank/a/b','/tank/a/b','tank/a/b@atomtx-0000000000000002','9223372036854775809','101',NULL);
INSERT INTO "volumes" VALUES('0000000000000003',0,'zfs','tank','11','tank/a','guid of tank/a','/tank/a','tank/a@atomtx-0000000000000003','9223372036854775808','101',0);
INSERT INTO "volumes" VALUES('0000000000000003',1,'zfs','tank','11','tank/a/b','guid of tank/a/b','/tank/a/b','tank/a/b@atomtx-0000000000000003','9223372036854775809','101',0);
INSERT INTO "volumes" VALUES('0000000000000004',0,'zfs','tank','11','tank/a','guid of tank/a','/tank/a','tank/a@atomtx-0000000000000004','9223372036854775808','101',0);
INSERT INTO "volumes" VALUES('0000000000000004',1,'zfs','tank','11','tank/a/b','guid of tank/a/b','/tank/a/b','tank/a/b@atomtx-0000000000000004','9223372036854775809','101',0);
INSERT INTO "volumes" VALUES('0000000000000005',0,'zfs','tank','11','tank/a','guid of tank/a','/tank/a','tank/a@atomtx-0000000000000005','9223372036854775808','101',0);
INSERT INTO "volumes" VALUES('0000000000000005',1,'zfs','tank','11','tank/a/b','guid of tank/a/b','/tank/a/b','tank/a/b@atomtx-0000000000000005','9223372036854775809','101',0);
INSERT INTO "volumes" VALUES('0000000000000006',0,'zfs','tank','11','tank/a','guid of tank/a','/tank/a','tank/a@atomtx-0000000000000006','9223372036854775808','101',0);
INSERT INTO "volumes" VALUES('0000000000000006',1,'zfs','tank','11','tank/a/b','guid of tank/a/b','/tank/a/b','tank/a/b@atomtx-0000000000000006','9223372036854775809','101',0);
INSERT INTO "volumes" VALUES('0000000000000007',0,'zfs','tank','11','tank/a','guid of tank/a','/tank/a','tank/a@atomtx-0000000000000007','9223372036854775808','101',0);
INSERT INTO "volumes" VALUES('0000000000000007',1,'zfs','tank','11','tank/a/b','guid of tank/a/b','/tank/a/b','tank/a/b@atomtx-0000000000000007','9223372036854775809','101',0);
CREATE UNIQUE INDEX uq_runs_active_job ON runs (job) WHERE state <> 'destroyed' AND cleanup IS NULL;
CREATE INDEX ix_runs_started_at ON runs (started_at);
CREATE INDEX ix_runs_open ON runs (started_at) WHERE state <> 'destroyed';
CREATE INDEX ix_steps_run ON steps (run);
COMMIT;
