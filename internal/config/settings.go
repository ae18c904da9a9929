// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strconv"
	"strings"
	"time"
)

// table lists every setting once, in the order of the default file. It is the
// only place that connects keys with fields and says what they may hold. Zero is
// allowed only where it means nothing but zero: the stages take a zero option for
// their default.
func table(c *Config) []setting {
	a, s, b, t := &c.Agent, &c.Sensor, &c.Buffer, &c.Transport
	return []setting{
		text("agent.id", &a.ID, identifier),
		text("agent.tenant", &a.Tenant, identifier),
		text("agent.state_dir", &a.StateDir, required(absolute)),

		text("context.case_id", &c.Context.CaseID, identifier),
		text("context.investigation_id", &c.Context.InvestigationID, identifier),
		text("context.user_id", &c.Context.UserID, identifier),

		live(text("log.level", &c.Log.Level, oneOf("debug", "info", "warn", "error"))),
		text("log.format", &c.Log.Format, oneOf("auto", "console", "json", "journal")),
		live(text("log.components.agent", &c.Log.Components.Agent, optional(oneOf("debug", "info", "warn", "error")))),
		live(text("log.components.sensor", &c.Log.Components.Sensor, optional(oneOf("debug", "info", "warn", "error")))),
		live(text("log.components.transport", &c.Log.Components.Transport, optional(oneOf("debug", "info", "warn", "error")))),

		text("http.listen", &c.HTTP.Listen, hostPort),

		text("control.socket", &c.Control.Socket, required(socketPath)),
		text("control.group", &c.Control.Group, identifier),

		scope("sensor.scope", &s.Scope),
		size("sensor.priority_ring", &s.PriorityRing, 4*KiB, GiB, ringSize),
		size("sensor.bulk_ring", &s.BulkRing, 4*KiB, GiB, ringSize),
		integer("sensor.process_table", &s.ProcessTable, 1024, 4194304),
		boolean("sensor.fork_events", &s.ForkEvents),
		boolean("sensor.file.enabled", &s.File.Enabled),
		live(integer("sensor.file.per_process", &s.File.PerProcess, 0, 1000000)),
		live(list("sensor.file.exclude_paths", &s.File.ExcludePaths, excludable)),
		live(list("sensor.file.exclude_executables", &s.File.ExcludeExecutables, required(absolute))),
		boolean("sensor.hash.enabled", &s.Hash.Enabled),
		size("sensor.hash.max_size", &s.Hash.MaxSize, KiB, 16*GiB, nil),
		integer("sensor.hash.per_second", &s.Hash.PerSecond, 1, 100000),
		duration("sensor.hash.wait", &s.Hash.Wait, time.Millisecond, time.Second),

		boolean("guard.enabled", &c.Guard.Enabled),
		integer("guard.cpu_percent", &c.Guard.CPUPercent, 0, 100000),

		text("buffer.dir", &b.Dir, required(absolute)),
		live(size("buffer.cap", &b.Cap, 16*MiB, TiB, nil)),
		size("buffer.commit_bytes", &b.CommitBytes, 4*KiB, 8*MiB, nil),
		duration("buffer.commit_interval", &b.CommitInterval, time.Millisecond, 5*time.Second),
		live(duration("buffer.retain_age", &b.RetainAge, time.Second, 24*time.Hour)),
		live(size("buffer.retain_bytes", &b.RetainBytes, KiB, TiB, nil)),
		text("buffer.compression", &b.Compression, oneOf("none", "s2", "zstd")),
		boolean("buffer.allow_unsafe", &b.AllowUnsafe),

		text("transport.topology", &t.Topology, topology),
		text("transport.address", &t.Address, redisAddresses),
		text("transport.sentinel.master", &t.Sentinel.Master, identifier),
		text("transport.sentinel.username", &t.Sentinel.Username, anyText),
		text("transport.sentinel.password_file", &t.Sentinel.PasswordFile, printable),
		text("transport.username", &t.Username, anyText),
		text("transport.password_file", &t.PasswordFile, printable),
		integer("transport.db", &t.DB, 0, 65535),
		boolean("transport.tls.enabled", &t.TLS.Enabled),
		text("transport.tls.ca_file", &t.TLS.CAFile, absolute),
		text("transport.tls.cert_file", &t.TLS.CertFile, absolute),
		text("transport.tls.key_file", &t.TLS.KeyFile, printable),
		text("transport.tls.server_name", &t.TLS.ServerName, identifier),
		text("transport.prefix", &t.Prefix, required(keyPart)),
		text("transport.shard", &t.Shard, required(keyPart)),
		integer("transport.shards", &t.Shards, 1, 256),
		text("transport.decisions_key", &t.DecisionsKey, required(streamKey)),
		text("transport.agents_key", &t.AgentsKey, required(streamKey)),
		text("transport.approvals_key", &t.ApprovalsKey, required(streamKey)),
		integer("transport.decisions_maxlen", &t.DecisionsMaxLen, 0, 100000000),
		text("transport.encoding", &t.Encoding, oneOf("json", "zstd-batch")),
		text("transport.trim", &t.Trim, trimPolicy),
		text("transport.ack", &t.Ack, oneOf("reply", "replica", "fsync")),
		integer("transport.batch_records", &t.BatchRecords, 1, 10000),
		size("transport.batch_bytes", &t.BatchBytes, KiB, MiB, nil),
		duration("transport.linger", &t.Linger, time.Millisecond, 10*time.Second),
		duration("transport.timeout", &t.Timeout, 100*time.Millisecond, time.Minute),
		duration("transport.backoff_base", &t.BackoffBase, 10*time.Millisecond, time.Minute),
		duration("transport.backoff_limit", &t.BackoffLimit, 100*time.Millisecond, 10*time.Minute),
		duration("transport.reconnect_spread", &t.ReconnectSpread, time.Millisecond, 5*time.Minute),
	}
}

// contradiction is a defect of values that are each allowed but not together.
type contradiction struct {
	keys         []string // the one to blame, then the others
	what, remedy string
}

func contradictions(c *Config) []contradiction {
	var out []contradiction
	bad := func(wrong bool, what, remedy string, keys ...string) {
		if wrong {
			out = append(out, contradiction{keys, what, remedy})
		}
	}
	b, t := c.Buffer, c.Transport
	bad(b.RetainBytes > b.Cap/2,
		FormatSize(b.RetainBytes)+" is more than half of buffer.cap ("+FormatSize(b.Cap)+"), so delivered records would crowd out new ones",
		"set "+FormatSize(b.Cap/2)+" or less", "buffer.retain_bytes", "buffer.cap")
	bad(int64(b.CommitBytes) > b.Cap/16,
		FormatSize(int64(b.CommitBytes))+" is more than a sixteenth of buffer.cap ("+FormatSize(b.Cap)+")",
		"set "+FormatSize(b.Cap/16)+" or less", "buffer.commit_bytes", "buffer.cap")
	bad(t.BackoffBase > t.BackoffLimit,
		formatDuration(t.BackoffBase)+" is longer than transport.backoff_limit ("+formatDuration(t.BackoffLimit)+")",
		"set "+formatDuration(t.BackoffLimit)+" or less", "transport.backoff_base", "transport.backoff_limit")
	bad(t.TLS.CertFile != "" && t.TLS.KeyFile == "",
		"is set, but transport.tls.key_file is not", "name the key of this certificate", "transport.tls.cert_file")
	bad(t.TLS.KeyFile != "" && t.TLS.CertFile == "",
		"is set, but transport.tls.cert_file is not", "name the certificate of this key", "transport.tls.key_file")
	bad(!t.TLS.Enabled && t.TLS != TLS{},
		"is false, but other keys of transport.tls are set", "set it to true, or remove them: the connection would not be encrypted",
		"transport.tls.enabled", "transport.tls.ca_file", "transport.tls.cert_file", "transport.tls.key_file", "transport.tls.server_name")
	several := strings.Contains(t.Address, ",")
	bad(t.Topology == "standalone" && several,
		"names several servers, and transport.topology is standalone", "set transport.topology to cluster or sentinel, or name one", "transport.address", "transport.topology")
	bad(t.Topology != "standalone" && strings.HasPrefix(t.Address, "unix://"),
		"is a socket, and transport.topology is "+t.Topology, "write host:port, or set transport.topology to standalone", "transport.address", "transport.topology")
	bad((t.Topology == "sentinel") != (t.Sentinel.Master != ""),
		"is "+quoteOr(t.Sentinel.Master, "empty")+", and transport.topology is "+t.Topology, "set both for Redis behind sentinels, or neither", "transport.sentinel.master", "transport.topology")
	bad(t.Sentinel.Username != "" && t.Sentinel.PasswordFile == "",
		"is set without a password", "put the password in a file named by transport.sentinel.password_file", "transport.sentinel.username")
	bad(t.Topology == "cluster" && t.DB != 0,
		"is not 0, and a cluster has no other", "remove it", "transport.db", "transport.topology")
	bad(t.Shards&(t.Shards-1) != 0,
		strconv.Itoa(t.Shards)+" is no power of two", "set 1, or 2, 4, ... 256, the same for every sensor of the fleet", "transport.shards")
	bad(t.Shards > 1 && t.Shard != Default().Transport.Shard,
		"is set, and with more than one of transport.shards it follows from the agent's id", "remove one of them", "transport.shard", "transport.shards")
	bad(t.Username != "" && t.PasswordFile == "",
		"is set without a password", "put the password in a file named by transport.password_file", "transport.username")
	return out
}
