// SPDX-License-Identifier: Apache-2.0

package event

// String is the last part of the stream's default key.
func (d Decisions) String() string {
	switch d {
	case DecisionsAgents:
		return "agents"
	case DecisionsApprovals:
		return "approvals"
	default:
		return "system"
	}
}

// Decision explains what a record about the sensor with this code means.
type Decision struct {
	Code    string // status_code of the record, code of the log line
	Name    string // activity_name
	Stream  Decisions
	Meaning string // what was decided or found, and which evidence the record carries
	Remedy  string // what to do
}

// Explain finds the explanation of a code.
func Explain(code string) (d Decision, ok bool) {
	for _, d := range DecisionTable() {
		if d.Code == code {
			return d, true
		}
	}
	return Decision{}, false
}

// DecisionTable lists every decision there is, in the order of docs/decisions.md,
// which is generated from it.
func DecisionTable() []Decision {
	const nothing = "Nothing; it is here so that the history is complete."
	return []Decision{
		{
			"START", "Start", DecisionsSystem,
			"The sensor was started. The record says what each event is seen by on this host (`coverage`), what is not seen (`missing`), the scope, the hashes of the configuration, of the binary and of the files that say how it runs (`files_sha256`), the buffer's epoch and its size, and why its directory is a bad place for it, if it is (`buffer_hazards`).",
			"A `missing` event is a blind spot: `edr-sensor doctor` says why. A binary hash that is not that of your package needs an explanation.",
		},
		{"STOP", "Stop", DecisionsSystem, "The sensor was asked to stop, by a signal or by systemd. What it had read until then is kept.", "Find out who asked, where no deployment did: stopping the sensor is what an intruder tries first."},
		{
			"MODE", "Mode Change", DecisionsSystem,
			"The mode of the sensor as a whole has changed, from `before` to `after`; the message is the reason. The worst that holds is the mode: truncating, degraded, buffering, online.",
			"`buffering`: bring Redis back before the buffer is full. `degraded` and `truncating`: evidence is being lost; the message names the metric to look at.",
		},
		{
			"HOOK_LOST", "Hook Lost", DecisionsSystem,
			"A program of the sensor was detached, or did not run when the sensor tried it. `before` is the hook that was lost, `after` the one that sees the `events` now: the same again, the next best, or none. `evidence` is how it showed.",
			"Somebody or something took away a program of the sensor, or switched kprobes off. Look for who used bpf(2) at that time. Where `after` is none or raw_tp/sys_exit, restart the sensor once the cause is gone.",
		},
		{
			"TAMPERING", "Tampering", DecisionsSystem,
			"Somebody did something to the sensor itself: a signal that ends or stops it (what systemd sends to stop or restart it is not among them), control of its process or use of its memory, or a change of its binary, unit, configuration or buffer. `actor` and `process` are who, `event` is which event of the stream of events shows it; what it was done to is in `after`.",
			"Where it was no administrator's or package manager's work (those have severity 3), treat the host as compromised: it is what an intruder does before anything that should not be seen.",
		},
		{
			"BINARY_REPLACED", "Binary Replaced", DecisionsSystem,
			"The file that the sensor was started from is another one than what runs, or is gone: `before` is the SHA-256 of what runs, `after` that of what is there now. Who put it there is in the TAMPERING of that moment, at an upgrade the package manager.",
			"Expect it, and a START soon after, where the package was upgraded. Otherwise compare `after` with the package's file, and see who did it.",
		},
		{
			"LOAD_SHED", "Load Shed", DecisionsSystem,
			"The sensor does less, because it takes too much or the host has too little: `before` and `after` are what it gives up, in the order nothing, hashes, lookups, files, most files, each with those before it; the message says which signal was above which bound for how long, `readings` has all of them. Events of programs, losses, decisions and tampering are never given up. What is not done is counted: executables without a hash say `hash_note` `shed`, file events are in SUPPRESSED with `shed`.",
			"Find what keeps the sensor busy (`edr-sensor status`), or give it more: `guard.cpu_percent`, MemoryMax= of its unit.",
		},
		{
			"LOAD_RESTORED", "Load Restored", DecisionsSystem,
			"The sensor does again what it had given up, a step at a time, after half a minute without pressure. At `after` nothing, `not_hashed` and `not_looked_up` say how much was not done since the first LOAD_SHED.",
			nothing,
		},
		{
			"HTTP_UNSERVED", "HTTP Not Served", DecisionsSystem,
			"`http.listen` could not be opened at the start, or failed since, so `/metrics` and the other pages there are not served. Events are seen, kept and delivered all the same, and the control socket answers. `error` is why: another process holds the port, or the host does not have the `address` yet.",
			"`ss -ltnp` names who holds the port. Where that is no mistake of configuration, somebody wants the sensor's metrics to be missing or to be theirs. It is tried again each second; another address needs a restart.",
		},
		{"HTTP_SERVED", "HTTP Served", DecisionsSystem, "`http.listen` could be opened after HTTP_UNSERVED, and is served.", "Find out who had held the port since `start_time`."},
		{"HOOK_BACK", "Hook Back", DecisionsSystem, "An event is seen again after HOOK_LOST.", "Find out what had happened in between."},
		{
			"SNAPSHOT", "Degraded", DecisionsSystem,
			"The processes that ran before the sensor could not be listed, so they appear in events without their command line and ancestors.",
			"Restart the sensor; when it stays, the kernel refuses the task iterator: `edr-sensor doctor`.",
		},

		{
			"CONFIG_LOADED", "Configuration Loaded", DecisionsSystem,
			"The configuration that the run began with: its hash (`after`), the files and variables that it comes from (`sources`), and what differs from the defaults (`settings`).",
			nothing,
		},
		{
			"CONFIG_RELOADED", "Configuration Reloaded", DecisionsSystem,
			"The configuration was read again and accepted. `applied` lists what has changed at once, with the values before and after, `needs_restart` what is in the file and waits for a restart; `asked_by` says who asked.",
			"Restart the sensor when `needs_restart` is not empty.",
		},
		{
			"CONFIG_REJECTED", "Configuration Rejected", DecisionsSystem,
			"The configuration was read again and has the `problems` listed, each with its place. Nothing of it was applied; the sensor goes on with what it had.",
			"Correct the file (`edr-sensor check` shows the same problems), then reload again.",
		},
		{
			"FILTER_CHANGED", "Filter Changed", DecisionsSystem,
			"What the kernel programs leave out has changed, from `before` to `after`. `not_found` lists exclusions that do not exist on this host and so exclude nothing.",
			"Know who asked: an exclusion is a blind spot by order.",
		},
		{
			"LOG_LEVEL", "Log Level Changed", DecisionsSystem,
			"The level of the log has changed, as a whole or of one component. Records are not affected.",
			nothing,
		},

		{"CASES_DAMAGED", "Cases Set Aside", DecisionsSystem, "The file of the open cases could not be read at the start, so none that was in it is open any more.", "Open the cases again; find out what wrote to the state directory."},
		{
			"RECORDS_LOST", "Lost Events", DecisionsSystem,
			"Records that had a sequence number will not be delivered. `unmapped.lost.ranges` names each range: `truncated` (the buffer was full), `corrupt` (damaged on disk), `server_loss` (Redis lost what it had confirmed, and the buffer no longer has it), `refused` (Redis does not take it, see RECORD_REFUSED). A range is named again when Redis may have lost the record that named it; where `count` is less than the range is long, so many of it are lost, and it stands for many that are no longer known one by one.",
			"Treat the ranges as unknown, not as quiet. The decisions before it say why.",
		},
		{
			"TRUNCATION_STARTED", "Truncation Started", DecisionsSystem,
			"The buffer is full and has begun to drop its oldest records. `first` and `last` enclose the sequence numbers dropped so far; RECORDS_LOST names them exactly.",
			"Bring Redis back, or let its consumers read: every second costs the oldest evidence. Raise `buffer.cap` where outages last longer.",
		},
		{
			"TRUNCATION_ENDED", "Truncation Ended", DecisionsSystem,
			"No record has been dropped for ten seconds. `count` is how many were in this episode, between `first` and `last`.",
			"Raise `buffer.cap` where this outage was a usual one.",
		},
		{
			"RINGBUF_FULL", "Lost Events", DecisionsSystem,
			"The kernel had no room in the rings for `count` events, which have no sequence numbers; `by_type` says of which kinds.",
			"Look for what stalls the disk or takes the CPU; raise `sensor.priority_ring` or `sensor.bulk_ring`; limit floods with `sensor.file.per_process`.",
		},
		{
			"RECURSION", "Lost Events", DecisionsSystem,
			"The kernel left out runs of programs that were interrupted on their CPU by themselves. Each may be an event that was not seen.",
			"Few of them under load are usual; many are worth a report with the kernel's version.",
		},
		{"UNDECODABLE", "Lost Events", DecisionsSystem, "Records of the kernel programs that the sensor does not understand: right after an upgrade, those that waited in the rings of a version which wrote them in another way.", "Where no TAKEN_OVER is before it, report it: program and binary do not belong together."},
		{"TOO_LARGE", "Lost Events", DecisionsSystem, "Events that are larger than the buffer accepts.", "Report it with the log line before it, which names the kind."},
		{"NOTICES", "Lost Events", DecisionsSystem, "So many decisions came at once that some have a log line and no record.", "Read the log of that time."},
		{
			"TAKEN_OVER", "Taken Over", DecisionsSystem,
			"The sensor was restarted, and systemd had kept its kernel programs and rings meanwhile: nothing was missed. `count` events waited since `start_time`, from `priority_position` and `bulk_position` of the rings on. `after` is `adopted` when the same programs go on, `replaced` when others took their place (`why`): then both saw everything for a moment, and `cut_ktime` is the kernel time from which the new ones count. `agreed_events` were seen by both on the right side of it.",
			"Nothing, unless `disagreed_events` is not 0: so many events around the cut may be there twice, or missing.",
		},
		{
			"KEEP_FAILED", "Keep Failed", DecisionsSystem,
			"The service manager does not keep the kernel programs and rings of the sensor, so that a restart will miss what happens meanwhile. The message says why.",
			"Use the unit of the package, or set `FileDescriptorStoreMax=` in yours as it does.",
		},
		{"BLIND_STOPPED", "Lost Events", DecisionsSystem, "The sensor had been stopped. What happened between `start_time` and `end_time` was not seen.", "Compare with the STOP before it: a stop without a deployment is suspicious."},
		{"BLIND_KILLED", "Lost Events", DecisionsSystem, "The sensor had ended without a stop: killed, crashed, or power was lost. What happened between `start_time` and `end_time` was not seen or not kept.", "Look into the kernel's log (out of memory?) and for who may send signals."},
		{"BLIND_REBOOT", "Lost Events", DecisionsSystem, "The host was rebooted. What happened between `start_time` and `end_time` was not seen.", "Compare with the host's own log of its boot."},
		{"BLIND_UNKNOWN", "Lost Events", DecisionsSystem, "When the sensor last ran is unknown, because what it had noted is not readable.", "Treat the time before this start as not watched."},
		{
			"CLOCK_JUMP", "Clock Jump", DecisionsSystem,
			"The wall clock was set by more than a second: from `before` to `after`, while the time since boot went on. Events keep their order by sequence number; times before and after do not compare.",
			"Find out who set the clock. A clock set back is a way to hide in logs that are sorted by time.",
		},

		{
			"BUFFER_SET_ASIDE", "Buffer Set Aside", DecisionsSystem,
			"The buffer's file was damaged, cut, removed, or another than the sensor left there (`error`). It was kept under another name (`path`, empty where there was none or no space for it), and every intact record was taken over into a new one (`salvaged`). Where `exact` is true, `count` records are lost and RECORDS_LOST names each of them; otherwise how far the file had been delivered is not known, a BUFFER_NEW follows, and the number lost is unknown.",
			"Check the disk and its kernel messages. Keep the file if you need an expert to look for evidence in it.",
		},
		{"BUFFER_NEW", "Buffer New", DecisionsSystem, "The buffer begins with a new epoch (`after`), from sequence number 1: at a first start, after the directory was emptied, or after a BUFFER_SET_ASIDE that is not exact. With an epoch `before`, delivery was fenced, and `count` records not delivered until then were moved to the new one.", "Where it is not the first start, find out who removed the buffer: it held evidence."},
		{
			"BUFFER_DAMAGED", "Buffer Damaged", DecisionsSystem,
			"A part of the buffer's file did not have its checksum. Its records are lost and named in a RECORDS_LOST; all others are not affected.",
			"Check the disk: bits do not change by themselves.",
		},
		{
			"BUFFER_RESIZED", "Buffer Resized", DecisionsSystem,
			"The buffer's file has another size, `after` instead of `before`, as `buffer.cap` now says. `count` records that had not been delivered did not fit into it and were dropped, the oldest first; RECORDS_LOST names them.",
			"Nothing, unless `count` is not 0: then let Redis take what waits before you make the buffer smaller.",
		},
		{
			"BUFFER_RESIZE_REFUSED", "Buffer Resize Refused", DecisionsSystem,
			"The buffer keeps the size that it had (`before`), because it could not get the one that `buffer.cap` says: `error` is why.",
			"Make room on the disk, or correct `buffer.cap`; then reload.",
		},
		{"BUFFER_FAILED", "Buffer Failed", DecisionsSystem, "The buffer cannot write to its disk (`error`). Events wait in memory and in the kernel's rings, which hold seconds.", "Act at once: check the disk, its mount and its kernel messages."},
		{"BUFFER_RECOVERED", "Buffer Recovered", DecisionsSystem, "The buffer writes again after BUFFER_FAILED. RINGBUF_FULL records tell whether anything was lost meanwhile.", "Find out what the disk had."},

		{
			"DELIVERY_HELD", "Delivery Held", DecisionsSystem,
			"Redis refuses events for a reason that does not pass by itself (`class`, `error`). They stay in the buffer; the sensor goes on trying.",
			"Do what `remedy` says.",
		},
		{"DELIVERY_RESUMED", "Delivery Resumed", DecisionsSystem, "Redis takes events again after DELIVERY_HELD or FENCED, or after an outage of some seconds; `start_time` and `end_time` enclose it, `away_seconds` is how long it was, `acked` the newest record that Redis had confirmed until then.", nothing},
		{
			"SERVER_BEHIND", "Rewind", DecisionsSystem,
			"Redis had less than it had confirmed: it lost the end of its data in a crash or a failover, or was emptied. It lacked the records from `first` to `last`; what the buffer still has of them was sent again.",
			"Check the server's persistence (`appendfsync`) and its replicas. What the buffer did not have any more is named in RECORDS_LOST.",
		},
		{
			"RECORD_REFUSED", "Record Refused", DecisionsSystem,
			"Redis, or a proxy or firewall before it, broke the connection each time that this one record was sent, and answered others meanwhile: it is larger than what they take (`bytes`), or they do not like what is in it. The record `seq` was copied to `path` and is named in a RECORDS_LOST, so that those behind it can be delivered; the newest 16 copies are kept. After eight in a row without one that is taken, delivery is held instead.",
			"Do what `remedy` says: the default limits of Redis take every record of the sensor. Keep the copy: it is an event that no consumer has seen, and an intruder may have chosen what is in it.",
		},
		{
			"FENCED", "Fenced", DecisionsSystem,
			"Another process writes under this agent's id, so delivery has stopped. A clone or a restored buffer alone does not lead here, for the sensor then goes on in a new epoch (IDENTITY_NEW); it stops when it is fenced again within ten minutes, or cannot write down the new epoch.",
			"Find both hosts by their agent id: two with the same `agent.id` in their configuration, or a machine that is put back again and again. Give each its own id, then restart the one that stopped: it goes on in a new epoch with all that waits in its buffer.",
		},
		{"IDENTITY_NEW", "Identity New", DecisionsSystem, "State or buffer of the sensor were copied, restored or moved to another machine, or Redis has newer records of another sensor under this one's id. What was not delivered, `count` records, goes on in a new epoch, and when the other one may still run under a new agent id: `before` and `after` are the ids, `cause` says how it showed. Records of both keep their place: nothing is lost, and what both have delivered under the old id is told apart by the epoch. The id in `metadata.uid` of the records that waited is still that of the old epoch.", "Expected after cloning a machine or restoring it from a snapshot. Templates of machines should have neither `/var/lib/edr-sensor` nor `/etc/machine-id`. With a configured `agent.id` give each machine its own."},
		{"SERVER_AT_RISK", "Server at Risk", DecisionsSystem, "Redis takes events, and something about it will end that or lose some. `risk` is what: `memory` (nearly full), `unread` (a stream that is trimmed nears its limit unread), `password` (the file's is refused, so that the next connect fails), `replica` (none confirms what was delivered). The message has the numbers.", "What the message says: let consumers read and trim, raise the limit, put the right password into the file, repair replication."},
		{"EVICTION_RISK", "Eviction Risk", DecisionsSystem, "Redis is configured to delete keys when it is full, so that it would delete whole streams without an error.", "Set `maxmemory-policy noeviction` on the server."},
		{
			"CREDENTIALS_ROTATED", "Credentials Rotated", DecisionsSystem,
			"The sensor has connected with another password than before. It is itself nowhere in the record.",
			"Where nobody rotated it, find out who wrote the file.",
		},

		{"SUPPRESSION_STARTED", "Suppression Started", DecisionsAgents, "The kernel programs have begun to leave out file events on purpose: of a process that makes too many, or of what is excluded.", "`edr-sensor events --kind file` shows who is busy; SUPPRESSED records say how many events of which kind."},
		{"SUPPRESSED", "Suppressed", DecisionsAgents, "How many events were left out on purpose between `start_time` and `end_time`, by kind. The next event that is reported of the same process says how many of its own were left out before it.", "Raise `sensor.file.per_process`, or shorten the exclusions, where the events are needed."},
		{"SUPPRESSION_ENDED", "Suppression Ended", DecisionsAgents, "Nothing has been left out for a minute; `events` is how many were in all.", nothing},

		{"CASE_OPENED", "Case Opened", DecisionsApprovals, "An operator opened a case: who, on what, until when, with which collection.", nothing},
		{"CASE_CLOSED", "Case Closed", DecisionsApprovals, "An operator closed a case. `tagged` is how many events carry its ids, and all of them come before this record; with `tagged_at_least` there may be more, since the sensor was killed meanwhile or was too busy, or about to stop, to say.", nothing},
		{"CASE_EXPIRED", "Case Expired", DecisionsApprovals, "A case has reached its end and was closed by the sensor.", "Open it again with a longer `--ttl` where it is still needed."},
		{"CASE_RESUMED", "Case Resumed", DecisionsApprovals, "The sensor was started while a case was open, and goes on with it.", nothing},
		{"CASE_REJECTED", "Case Rejected", DecisionsApprovals, "Somebody asked to open or close a case in a way that makes no sense; the message says why.", "Ask again as the message says."},
		{
			"EXPORT_STARTED", "Evidence Export Started", DecisionsApprovals,
			"Somebody gets records out of the buffer over the control socket (`edr-sensor buffer export`): who, as the kernel vouches for, and which (`query`). It is written before the first of them leaves.",
			"Know why. An EVIDENCE_EXPORTED follows; where none does, the sensor has ended meanwhile, and how much left is unknown.",
		},
		{
			"EVIDENCE_EXPORTED", "Evidence Exported", DecisionsApprovals,
			"An export has ended: `count` records and `bytes` of the seqs from `first` to `last` of an `epoch` went to who is named, with the `sha256` of what was sent, by which a file is told to be that export. `missing` is how many of the wanted seqs are not in it; `error` is why it ended early.",
			"Compare the hash with that of the file that is shown as evidence. Where nobody knows of the export, somebody with the rights of control.group read events.",
		},
		{"CONTROL_REFUSED", "Control Refused", DecisionsApprovals, "Somebody asked the control socket for something without the right to: who, as the kernel vouches for, and what.", "Add the user to the group named by `control.group` where the request was right; look into it where it was not."},
	}
}
