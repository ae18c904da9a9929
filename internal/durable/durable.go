// SPDX-License-Identifier: Apache-2.0

// Package durable writes small files that must survive a crash at any instant.
package durable

import (
	"errors"
	"os"
	"path/filepath"
)

// WriteFile makes a file with the content appear at path, whole or not at all, and
// durable when it returns nil. A file that is there is replaced. Only its owner can
// read it.
func WriteFile(path string, content []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
