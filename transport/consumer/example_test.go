// SPDX-License-Identifier: Apache-2.0

package consumer_test

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/transport/consumer"
)

// file appends records to a file, and is sure of them before they are acknowledged.
type file struct{ *os.File }

func (f file) Records(_ context.Context, recs []consumer.Record) error {
	for i := range recs {
		if _, err := f.Write(append(recs[i].Data, '\n')); err != nil {
			return err
		}
	}
	return nil
}

func (f file) Malformed(_ context.Context, e *consumer.EntryError) error {
	_, err := os.Stderr.WriteString(e.Error() + "\n")
	return err
}

func (f file) Flush(context.Context) error { return f.Sync() }

// A consumer that keeps everything, once and in order.
func ExampleGroup() {
	ctx := context.Background()
	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	defer client.Close()
	out, err := os.OpenFile("events.ndjson", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer out.Close()
	g, err := consumer.New(client, consumer.Options{
		Group: "archive", Name: "one",
		Streams: []string{"edr:{s000}:events", "decisions:system"},
	})
	if err != nil {
		return
	}
	for {
		err := g.Read(ctx, file{out})
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case err != nil: // the server is away: ask again
			time.Sleep(time.Second)
		}
	}
}
