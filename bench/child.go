// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A job is what one process does to one store. Each has a process of its own, so that
// memory and CPU time are that store's.
type job struct {
	Op    string // append, drain or open
	Store string
	Shape string
	Dir   string
	Limit int64
	Warm  int  // batches that are appended before the measurement begins
	Count int  // batches that are measured
	Kill  bool // end as kill -9 does, after one more batch
}

// result is what was measured. What a job does not measure is zero.
type result struct {
	Seconds float64 // of what Op names, for open that alone
	Open    float64
	Events  int
	Bytes   int64   // payload
	CPU     float64 // seconds, user and system
	Written int64   // bytes passed to write calls
	RSS     int64   // most anonymous memory
	Disk    int64   // most blocks of all files
	P50     float64 // of a durable append
	P99     float64
	First   uint64 // the events that were found
	Last    uint64
}

// run does j in this process.
func (j job) run() (r result, err error) {
	p, err := peerNamed(j.Store)
	if err != nil {
		return r, err
	}
	i := slices.IndexFunc(shapes, func(s shape) bool { return s.name == j.Shape })
	if i < 0 {
		return r, fmt.Errorf("no shape %q", j.Shape)
	}
	b, err := newBatch(shapes[i])
	if err != nil {
		return r, err
	}
	start := time.Now()
	s, err := p.open(j.Dir, j.Limit)
	if err != nil {
		return r, fmt.Errorf("%s: open: %w", j.Store, err)
	}
	r.Open = time.Since(start).Seconds()
	switch j.Op {
	case "append":
		err = j.append(p, s, b, &r)
	case "drain":
		err = j.drain(s, b, &r)
	case "open":
		r.Seconds = r.Open
		if j.Kill {
			err = s.append(b.number(1))
		}
	default:
		err = fmt.Errorf("no job %q", j.Op)
	}
	if err != nil {
		return r, fmt.Errorf("%s: %s: %w", j.Store, j.Op, err)
	}
	if !j.Kill {
		err = s.close()
	}
	return r, err
}

func (j job) append(p peer, s store, b *batch, r *result) error {
	next := uint64(1)
	one := func() error {
		err := s.append(b.number(next))
		next += uint64(len(b.events))
		return err
	}
	for range j.Warm {
		if err := one(); err != nil {
			return err
		}
	}
	if err := settle(s); err != nil {
		return err
	}
	lat := make([]float64, 0, j.Count)
	m := newMeter(j.Dir)
	for range j.Count {
		start := time.Now()
		if err := one(); err != nil {
			return err
		}
		lat = append(lat, time.Since(start).Seconds())
	}
	if err := settle(s); err != nil {
		return err
	}
	if err := m.stop(r); err != nil {
		return err
	}
	r.Events, r.Bytes = j.Count*len(b.events), int64(j.Count)*int64(b.bytes)
	r.First, r.Last = 1, next-1
	if slices.Sort(lat); len(lat) > 0 {
		r.P50, r.P99 = lat[len(lat)/2], lat[len(lat)*99/100]
	}
	n, err := volatilePages(j.Dir, p.durable)
	if err == nil && n > 0 {
		err = fmt.Errorf("%d pages are not on disk after append has returned", n)
	}
	return err
}

// settle waits for what a store that does not wait in append has not made durable yet.
func settle(s store) error {
	if q, ok := s.(edr); ok {
		return q.settle()
	}
	return nil
}

// drain reads everything and checks it: consecutive events, each as it was appended.
func (j job) drain(s store, b *batch, r *result) error {
	m := newMeter(j.Dir)
	err := s.drain(func(e []byte) error {
		if r.First == 0 {
			n, err := stamp(e)
			if err != nil {
				return err
			}
			r.First, r.Last = n, n-1
		}
		r.Last++
		r.Events++
		r.Bytes += int64(len(e))
		return b.check(e, r.Last)
	})
	return errors.Join(err, m.stop(r))
}

// meter measures what happens between its making and stop.
type meter struct {
	dir     string
	start   time.Time
	cpu     float64
	written int64
	done    chan struct{}
	wg      sync.WaitGroup
	rss     int64
	disk    int64
	err     error
}

func newMeter(dir string) *meter {
	m := &meter{dir: dir, done: make(chan struct{}), start: time.Now(), cpu: cpuSeconds()}
	m.written, m.err = procNumber("/proc/self/io", "wchar:")
	m.wg.Go(func() {
		for t := time.NewTicker(50 * time.Millisecond); ; {
			n, err := procNumber("/proc/self/status", "RssAnon:")
			m.rss, m.err = max(m.rss, n<<10), errors.Join(m.err, err)
			m.disk = max(m.disk, diskUse(dir))
			select {
			case <-m.done:
				t.Stop()
				return
			case <-t.C:
			}
		}
	})
	return m
}

func (m *meter) stop(r *result) error {
	r.Seconds = time.Since(m.start).Seconds()
	r.CPU = cpuSeconds() - m.cpu
	n, err := procNumber("/proc/self/io", "wchar:")
	r.Written = n - m.written
	close(m.done)
	m.wg.Wait()
	r.RSS, r.Disk = m.rss, max(m.disk, diskUse(m.dir))
	return errors.Join(m.err, err)
}

func cpuSeconds() float64 {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

func procNumber(file, key string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(b), key)
	f := strings.Fields(rest)
	if !ok || len(f) == 0 {
		return 0, fmt.Errorf("%s has no %s", file, key)
	}
	return strconv.ParseInt(f[0], 10, 64)
}

// diskUse is what the files in dir take; one that goes meanwhile takes nothing.
func diskUse(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && d.Type().IsRegular() && unix.Stat(name, &st) == nil {
			n += st.Blocks * 512
		}
		return nil
	})
	return n
}

// each calls fn for every regular file in dir.
func each(dir string, fn func(f *os.File) error) error {
	return filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		return errors.Join(fn(f), f.Close())
	})
}

// volatilePages counts the pages that a power cut would take: dirty, or on their way.
// only limits it to the file of that name, or to the last one.
func volatilePages(dir, only string) (n uint64, err error) {
	err = each(dir, func(f *os.File) error {
		if only != "" && only != lastFile && filepath.Base(f.Name()) != only {
			return nil
		}
		var c unix.Cachestat_t
		err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &c, 0)
		if errors.Is(err, unix.ENOSYS) {
			return nil // before Linux 6.5 nobody knows
		}
		if only == lastFile {
			n = 0
		}
		n += c.Dirty + c.Writeback
		return err
	})
	return n, err
}

// dropCache writes back what is dirty in dir, and forgets the pages.
func dropCache(dir string) error {
	return each(dir, func(f *os.File) error {
		return errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	})
}

// childFlag starts a process that does one job, which it reads from its input.
const childFlag = "-child"

// start does j in a new process.
func (j job) start() (r result, err error) {
	in, err := json.Marshal(j)
	if err != nil {
		return r, err
	}
	exe, err := os.Executable()
	if err != nil {
		return r, err
	}
	c := exec.Command(exe, childFlag)
	c.Stdin, c.Stderr = strings.NewReader(string(in)), os.Stderr
	out, err := c.Output()
	var exit *exec.ExitError
	if j.Kill && errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		err = nil
	}
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w", j.Op, j.Store, err)
	}
	return r, err
}

// child is the other side of start.
func child(in io.Reader, out io.Writer) error {
	var j job
	if err := json.NewDecoder(in).Decode(&j); err != nil {
		return err
	}
	r, err := j.run()
	if err == nil {
		err = json.NewEncoder(out).Encode(r)
	}
	if err == nil && j.Kill {
		err = unix.Kill(os.Getpid(), unix.SIGKILL)
	}
	return err
}
