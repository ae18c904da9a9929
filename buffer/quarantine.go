// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/durable"
)

const (
	badSuffix    = ".bad-"
	badChunk     = "-seq-"    // behind the time, in the name of a chunk
	badRecord    = "-record-" // the same of a record, before its epoch and seq
	maxBadFiles  = 2          // whole files
	maxBadChunks = 16
	maxRefused   = 16                           // records
	badTime      = "20060102T150405.000000000Z" // sorts
)

// quarantine gives the damaged file at path a second name to be kept under, so that
// at no moment there is no file at path. What else was set aside makes room, the
// oldest first: two files are kept, together no larger than cap. It returns "" when
// there is no file.
func quarantine(path string, now time.Time, capacity int64) (string, error) {
	bad := badName(path, now)
	if err := os.Link(path, bad); err != nil {
		return "", ignoreNotExist(err)
	}
	size := blocks(bad)
	if err := prune(path, maxBadFiles, max(capacity, size)); err != nil {
		return "", err
	}
	return bad, syncDir(filepath.Dir(path))
}

// quarantineChunk keeps the pages of a damaged chunk, the first few of them: the
// oldest damage tells most about its cause.
func quarantineChunk(path string, now time.Time, first uint64, p []byte) error {
	all, err := filepath.Glob(path + badSuffix + "*" + badChunk + "*")
	if err != nil || len(all) >= maxBadChunks {
		return err
	}
	return os.WriteFile(fmt.Sprintf("%s%s%d", badName(path, now), badChunk, first), p, 0o600)
}

// quarantineRecord keeps a record that is not delivered, for good when it returns. The
// newest few are kept: each is evidence of its own. One that is there already stays.
func quarantineRecord(path string, now time.Time, capacity int64, epoch string, rec *Record) (string, error) {
	name := fmt.Sprintf("%s%s-%d", badRecord, epoch, rec.Seq)
	if same, err := filepath.Glob(path + badSuffix + "*" + name); err != nil || len(same) > 0 {
		return strings.Join(same[:min(len(same), 1)], ""), err
	}
	all, err := filepath.Glob(path + badSuffix + "*" + badRecord + "*")
	if err != nil {
		return "", err
	}
	slices.Sort(all) // by time
	for _, f := range all[:max(0, len(all)-maxRefused+1)] {
		if err := os.Remove(f); err != nil {
			return "", err
		}
	}
	kept := badName(path, now) + name
	if err := durable.WriteFile(kept, rec.Data); err != nil {
		return "", err
	}
	return kept, prune(path, maxBadFiles, max(capacity, blocks(kept)))
}

func badName(path string, now time.Time) string {
	return path + badSuffix + now.UTC().Format(badTime)
}

// prune removes what was set aside, the oldest first, until at most files whole ones
// remain, and bytes of space in all.
func prune(path string, files int, bytes int64) error {
	all, err := filepath.Glob(path + badSuffix + "*")
	if err != nil {
		return err
	}
	slices.Sort(all) // the names sort by time
	whole, sum := 0, int64(0)
	for _, f := range all {
		sum += blocks(f)
		if isWhole(f) {
			whole++
		}
	}
	for _, f := range all {
		isWhole := isWhole(f)
		if sum <= bytes && (whole <= files || !isWhole) {
			continue
		}
		sum -= blocks(f)
		if isWhole {
			whole--
		}
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return nil
}

// isWhole tells a file that was set aside from a part of one.
func isWhole(path string) bool {
	name := filepath.Base(path)
	return !strings.Contains(name, badChunk) && !strings.Contains(name, badRecord)
}

// quarantined is the space that what was set aside takes.
func quarantined(path string) (sum int64) {
	_, sum = asides(path)
	return sum
}

// blocks is the space that a file takes, 0 when there is none.
func blocks(path string) int64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

func noSpace(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
