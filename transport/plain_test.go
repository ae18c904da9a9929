// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"testing"

	"github.com/redis/go-redis/v9"
)

// plainProducer sends everything in q the way a producer without a protocol
// does: pipelined XADD, and the batch again after an error. It returns how many
// batches it repeated.
func plainProducer(t testing.TB, o *redis.Options, q *memQueue, batch int) (retries int) {
	t.Helper()
	c := redis.NewClient(o)
	defer c.Close()
	for after := uint64(0); after < q.Bounds().Last; {
		recs, err := q.Read(t.Context(), after, nil, batch, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		for {
			err := plainXADD(t.Context(), c, recs)
			if err == nil {
				break
			}
			retries++
		}
		after = recs[len(recs)-1].Seq
	}
	return retries
}
