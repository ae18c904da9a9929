// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// Slots is how many hash slots a Redis Cluster has.
const Slots = 16384

// MaxShards is the largest number of shards.
const MaxShards = 256

// Shard returns the shard that the records of an agent go to, of n.
func Shard(agentID string, n int) int {
	return int(xxhash.Sum64String(agentID) % uint64(max(n, 1)))
}

// Tag returns the hash tag of shard i of n, a power of two up to [MaxShards]. The
// only shard has "s000". Of more, each has a text whose slot is the middle of the
// i-th of n equal ranges of slots, so that any even split of the slots is an even
// split of the shards: texts that merely count (s000, s001, ...) put none on some
// nodes and five on others. testdata/shards.txt lists them for other languages.
func Tag(i, n int) string {
	if n <= 1 {
		return "s000"
	}
	want := i*(Slots/n) + Slots/n/2
	prefix := fmt.Sprintf("s%03d-", i)
	crc := crc16(0, prefix)
	for k := int64(0); ; k++ { // one in Slots texts fits
		if text := strconv.FormatInt(k, 36); int(crc16(crc, text))%Slots == want {
			return prefix + text
		}
	}
}

// Tagged returns key with the tag, so that it is in the tag's slot, unless it
// already has one.
func Tagged(key, tag string) string {
	if strings.Contains(key, "{") {
		return key
	}
	return key + ":{" + tag + "}"
}

// slot is the slot of a key: CRC-16/XMODEM of its tag, or of all of it without one.
func slot(key string) int {
	if _, after, found := strings.Cut(key, "{"); found {
		if tag, _, closed := strings.Cut(after, "}"); closed && tag != "" {
			key = tag
		}
	}
	return int(crc16(0, key)) % Slots
}

func crc16(crc uint16, s string) uint16 {
	for i := range len(s) {
		crc ^= uint16(s[i]) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
	}
	return crc
}
