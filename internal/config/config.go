// SPDX-License-Identifier: Apache-2.0

// Package config reads the sensor's configuration: defaults, then the file,
// then the drop-ins beside it, then the environment. Reading is strict. An
// unknown key, a wrong type or a value out of range is a [Problem] that says
// where it stands and what to do about it, and all problems are reported at
// once. The YAML library is an implementation detail of this package.
//
// No secret is ever part of a Config: it names the files that hold them.
package config

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// DefaultPath is where the packages install the configuration file.
const DefaultPath = "/etc/edr-sensor/edr-sensor.yaml"

// Byte units of sizes.
const (
	KiB = 1 << 10
	MiB = 1 << 20
	GiB = 1 << 30
	TiB = 1 << 40
)

// Config is the whole configuration. It is a plain value, safe to copy and to
// share once loaded; nobody writes to its lists. packaging/config/edr-sensor.yaml documents
// each key.
type Config struct {
	Agent     Agent
	Context   Context
	Log       Log
	HTTP      HTTP
	Control   Control
	Sensor    Sensor
	Guard     Guard
	Buffer    Buffer
	Transport Transport
}

// Agent says who this installation is and where it keeps its state.
type Agent struct {
	ID       string // empty: made at the first start and kept in StateDir
	Tenant   string
	StateDir string
}

// Context holds the ids that the whole run belongs to, if any. They are bound to
// every log line, event and decision.
type Context struct {
	CaseID, InvestigationID, UserID string
}

// Log says what is written to standard error, and how.
type Log struct {
	Level      string // debug, info, warn, error
	Format     string // auto, console, json, journal
	Components LogComponents
}

// LogComponents are the levels of parts of the sensor; empty: Log.Level.
type LogComponents struct{ Agent, Sensor, Transport string }

// HTTP is the server of /metrics, /healthz, /readyz and /status.
type HTTP struct {
	Listen string // host:port; empty: no server
}

// Control is the unix socket of the subcommands status and events.
type Control struct {
	Socket string
	Group  string // may use the socket beside root; empty: root only
}

// Sensor says what is watched and with which resources.
type Sensor struct {
	Scope                  Scope
	PriorityRing, BulkRing int64 // bytes; powers of two, at least a page
	ProcessTable           int   // processes remembered at most
	ForkEvents             bool
	File                   File
	Hash                   Hash
}

// File says which changes of the file system are reported.
type File struct {
	Enabled            bool
	PerProcess         int      // events of one process a second; 0: no limit
	ExcludePaths       []string // directories; absolute
	ExcludeExecutables []string // absolute paths
}

// Hash bounds the hashing of executables.
type Hash struct {
	Enabled   bool
	MaxSize   int64         // bytes; larger files are not hashed
	PerSecond int           // files
	Wait      time.Duration // longest time a batch of events waits for its hashes
}

// Guard says when the sensor does less, rather than take too much of the host.
type Guard struct {
	Enabled    bool
	CPUPercent int // own CPU time over ten seconds, of one CPU; 0: no bound
}

// Buffer bounds the queue on disk.
type Buffer struct {
	Dir            string
	Cap            int64 // bytes the file may have
	CommitBytes    int
	CommitInterval time.Duration
	RetainAge      time.Duration // of acknowledged records
	RetainBytes    int64
	Compression    string // none, s2 or zstd
	AllowUnsafe    bool   // use a directory where records are not safe
}

// Transport says where events go.
type Transport struct {
	// Topology is standalone, sentinel or cluster. Address is host:port or
	// unix:///path, or with the other two host:port separated by commas; empty:
	// nothing is sent.
	Topology               string
	Address                string
	Sentinel               SentinelAccess
	Username, PasswordFile string // PasswordFile is absolute or empty
	DB                     int
	TLS                    TLS
	Prefix, Shard          string // the events stream is Prefix:{Shard}:events
	Shards                 int    // more than one: Shard follows from the agent's id
	// The streams of the decisions: DecisionsKey is that of the sensor about itself.
	DecisionsKey, AgentsKey, ApprovalsKey string
	DecisionsMaxLen                       int    // about how many entries each keeps; 0: all
	Encoding                              string // json or zstd-batch, of the events stream
	Trim                                  string // of the events stream, see ParseTrim
	Ack                                   string // reply, replica or fsync
	BatchRecords, BatchBytes              int
	Linger                                time.Duration
	Timeout                               time.Duration // of one exchange with the server
	BackoffBase, BackoffLimit             time.Duration
	ReconnectSpread                       time.Duration
}

// SentinelAccess says which master the sentinels are asked for, and as whom.
type SentinelAccess struct {
	Master                 string
	Username, PasswordFile string // PasswordFile is absolute or empty
}

// EventsKey is the key of the events stream.
func (t Transport) EventsKey() string { return t.Prefix + ":{" + t.Shard + "}:events" }

// Streams are the keys of all streams, the events first, each once.
func (t Transport) Streams() []string {
	var keys []string
	for _, k := range append([]string{t.EventsKey()}, t.DecisionKeys()...) {
		if !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	return keys
}

// SecretFiles are the files with secrets that t names, by key; empty where
// there is none.
func (t Transport) SecretFiles() map[string]string {
	return map[string]string{
		"transport.password_file": t.PasswordFile, "transport.sentinel.password_file": t.Sentinel.PasswordFile, "transport.tls.key_file": t.TLS.KeyFile,
	}
}

// DecisionKeys are the keys of the decision streams: system, agents, approvals.
func (t Transport) DecisionKeys() []string {
	return []string{t.DecisionsKey, t.AgentsKey, t.ApprovalsKey}
}

// TLS says how the connection to Redis is protected. The paths are absolute or
// empty.
type TLS struct {
	Enabled                   bool
	CAFile, CertFile, KeyFile string
	ServerName                string
}

// ScopeKind says how a [Scope] limits what is watched.
type ScopeKind uint8

// The kinds of scope.
const (
	ScopeAll    ScopeKind = iota // the whole host
	ScopeTree                    // a process and its descendants
	ScopeCgroup                  // a cgroup
)

// Scope is the part of the host that is watched; the zero Scope is all of it.
type Scope struct {
	Kind   ScopeKind
	PID    uint32 // ScopeTree
	Cgroup string // ScopeCgroup: path below the cgroup root, or the absolute path of its directory
}

// String returns the scope as it is written in the configuration.
func (s Scope) String() string {
	switch s.Kind {
	case ScopeTree:
		return fmt.Sprintf("tree:%d", s.PID)
	case ScopeCgroup:
		return "cgroup:" + s.Cgroup
	default:
		return "all"
	}
}

// Default returns the configuration of a sensor that was told nothing: it
// watches the host and keeps its events in the buffer.
func Default() Config {
	return Config{
		Agent:   Agent{StateDir: "/var/lib/edr-sensor"},
		Log:     Log{Level: "info", Format: "auto"},
		HTTP:    HTTP{Listen: "127.0.0.1:9477"},
		Control: Control{Socket: "/run/edr-sensor/control.sock"},
		Sensor: Sensor{
			// Two seconds of a stalled disk at 5,000 execs a second and some
			// 1.5 KB each, rounded up to a power of two.
			PriorityRing: 16 * MiB,
			BulkRing:     8 * MiB,
			ProcessTable: 65536,
			File:         File{Enabled: true, PerProcess: 1000},
			Hash:         Hash{Enabled: true, MaxSize: 64 * MiB, PerSecond: 200, Wait: 50 * time.Millisecond},
		},
		Guard: Guard{Enabled: true, CPUPercent: 100},
		Buffer: Buffer{
			Dir: "/var/lib/edr-sensor/buffer", Cap: 512 * MiB, Compression: "s2",
			CommitBytes: 256 * KiB, CommitInterval: 50 * time.Millisecond,
			RetainAge: 5 * time.Minute, RetainBytes: 64 * MiB,
		},
		Transport: Transport{
			Topology: "standalone", Shards: 1, Trim: "none", Ack: "reply", ReconnectSpread: 500 * time.Millisecond,
			Prefix: "edr", Shard: "s000", DecisionsKey: "decisions:system", AgentsKey: "decisions:agents", ApprovalsKey: "decisions:approvals", DecisionsMaxLen: 100000,
			Encoding:     "json",
			BatchRecords: 256, BatchBytes: 768 * KiB, Linger: 50 * time.Millisecond,
			Timeout: 3 * time.Second, BackoffBase: 250 * time.Millisecond, BackoffLimit: 30 * time.Second,
		},
	}
}

// Load reads the file at path, the drop-ins conf.d/*.yaml beside it in the order
// of their names, and the overrides in environ (as os.Environ gives it), each
// over the one before. With an empty path it reads the environment only. The
// error joins one [Problem] per defect, in the order in which they stand.
func Load(path string, environ []string) (Config, error) {
	l := newLoader(environ)
	l.files(path)
	l.environment(environ)
	return l.finish()
}

// Setting is one effective value and who set it.
type Setting struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Source string `json:"source"` // "default", file:line:column, or the variable
	Live   bool   `json:"live"`   // a reload applies it; others need a restart
}

// Explain loads like [Load] and lists every setting in the order of the default
// file, together with where its value comes from.
func Explain(path string, environ []string) (Config, []Setting, error) {
	l := newLoader(environ)
	l.files(path)
	l.environment(environ)
	c, err := l.finish()
	var out []Setting
	for _, s := range table(&c) {
		src := "default"
		if pos, ok := l.set[s.key]; ok {
			src = pos.String()
		}
		out = append(out, Setting{s.key, s.show(), src, s.live})
	}
	return c, out, err
}

// Change is a setting that two configurations have different values for.
type Change struct {
	Key    string `json:"key"`
	Before string `json:"before"`
	After  string `json:"after"`
	Live   bool   `json:"live"` // a reload applies it; others need a restart
}

// Diff lists what differs between two configurations, in the order of the default
// file.
func Diff(before, after Config) []Change {
	var out []Change
	b, a := table(&before), table(&after)
	for i := range b {
		if x, y := b[i].show(), a[i].show(); x != y {
			out = append(out, Change{b[i].key, x, y, b[i].live})
		}
	}
	return out
}

// Adopt returns c with the settings that need no restart taken from next.
func (c Config) Adopt(next Config) Config {
	c.Log.Level, c.Log.Components = next.Log.Level, next.Log.Components
	f := next.Sensor.File
	c.Sensor.File.PerProcess, c.Sensor.File.ExcludePaths, c.Sensor.File.ExcludeExecutables = f.PerProcess, f.ExcludePaths, f.ExcludeExecutables
	c.Buffer.Cap, c.Buffer.RetainAge, c.Buffer.RetainBytes = next.Buffer.Cap, next.Buffer.RetainAge, next.Buffer.RetainBytes
	return c
}

// Keys lists every key, in the order of the default file.
func Keys() []string {
	var c Config
	var keys []string
	for _, s := range table(&c) {
		keys = append(keys, s.key)
	}
	return keys
}

// Dump returns the configuration as YAML that [Load] reads back to the same
// value, every key included. It contains no secrets, because a Config has none.
func (c Config) Dump() []byte {
	var b strings.Builder
	var open []string
	for _, s := range table(&c) {
		path := strings.Split(s.key, ".")
		sections := path[:len(path)-1]
		for i, name := range sections {
			if i < len(open) && open[i] == name && slices.Equal(open[:i], sections[:i]) {
				continue
			}
			fmt.Fprintf(&b, "%s%s:\n", strings.Repeat("  ", i), name)
		}
		open = sections
		fmt.Fprintf(&b, "%s%s: %s\n", strings.Repeat("  ", len(sections)), path[len(path)-1], s.yaml())
	}
	return []byte(b.String())
}

// Hash identifies the effective configuration: hex SHA-256 of [Config.Dump]. Two
// configurations that mean the same have the same hash, however they are
// written.
func (c Config) Hash() string {
	sum := sha256.Sum256(c.Dump())
	return hex.EncodeToString(sum[:])
}

// decisionsKey is the key of another decisions stream than system's, when only that
// is configured: what stands for "system" there, or behind it.
func decisionsKey(system, name string) string {
	if i := strings.LastIndex(system, "system"); i >= 0 {
		return system[:i] + name + system[i+len("system"):]
	}
	return system + ":" + name
}

// bufferDir is the directory of the buffer when none is configured.
func bufferDir(stateDir string) string { return filepath.Join(stateDir, "buffer") }
