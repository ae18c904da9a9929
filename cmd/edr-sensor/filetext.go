// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// change says what a file event changed, and which marks it bears.
func (r *record) change() (what string, notes []string) {
	f, x := r.File, r.Unmapped
	what = f.String()
	switch r.Metadata.EventCode {
	case "file.write":
		if x.Write.Bytes > 0 {
			what += " " + bytesText(x.Write.Bytes)
		}
		if x.Write.Created {
			what += " (new)"
		}
	case "file.delete":
		if x.Delete != nil && x.Delete.Left > 0 {
			what += fmt.Sprintf(" (%d of its names left)", x.Delete.Left)
		}
	case "file.rename":
		if x.Rename.Exchanged {
			what += " ↔ " + r.Result.String()
		} else {
			what += " → " + r.Result.String()
		}
		if x.Rename.Replaced {
			what += " (replaced)"
		}
	case "file.link", "file.symlink":
		what += " → " + orUnknown(f.X.Target)
	case "file.chmod":
		if r.Result != nil {
			what += fromTo(f.X.Mode, r.Result.X.Mode)
			if r.Result.TypeID != folderType && special(r.Result.X.Mode) && !special(f.X.Mode) {
				notes = append(notes, "setuid or setgid")
			}
		}
	case "file.chown":
		if r.Result != nil {
			what += fromTo(f.owner(), r.Result.owner())
		}
	case "file.truncate":
		if r.Result != nil {
			what += fromTo(f.size(), r.Result.size())
		}
	case "file.timestomp":
		if r.Result != nil {
			what += fromTo(f.modified(), r.Result.modified())
		}
	case "file.chattr":
		for _, flag := range x.Chattr.Old {
			if !slices.Contains(x.Chattr.New, flag) {
				what += " -" + flag
			}
		}
		for _, flag := range x.Chattr.New {
			if !slices.Contains(x.Chattr.Old, flag) {
				what += " +" + flag
			}
		}
		if len(x.Chattr.New) == 0 && len(x.Chattr.Old) == 0 {
			what += " no flags"
		}
	case "file.xattr":
		if x.Xattr.Removed {
			what += " -" + x.Xattr.Name
		} else {
			what += " +" + x.Xattr.Name
		}
	case "file.mount":
		what = orUnknown(f.Volume) + " on " + what
		if x.Mount.FSType != "" {
			what += " type " + x.Mount.FSType
		}
		if len(x.Mount.Flags) > 0 {
			what += " " + strings.Join(x.Mount.Flags, ",")
		}
	case "file.move_mount":
		what = orUnknown(x.Mount.From) + " → " + what
	}
	if x.Degraded.Reason != "" {
		notes = append(notes, "degraded")
	}
	return what, notes
}

// fromTo leaves out what is not known, as of a degraded event.
func fromTo(before, after string) string {
	if before != "" {
		before = " " + before
	}
	return before + " → " + orUnknown(after)
}

// folderType is the type_id of directories, to which setgid means something harmless.
const folderType = 2

// special tells whether an octal mode makes a program run as somebody else.
func special(mode string) bool {
	return len(mode) == 4 && (mode[0]-'0')&6 != 0
}

// owner is written as chown(1) takes it.
func (f *file) owner() string {
	name := f.Owner.Name
	if name == "" {
		name = f.Owner.UID
	}
	if f.X.GID != "" {
		name += ":" + f.X.GID
	}
	return name
}

func (f *file) size() string {
	if f.Size == nil {
		return ""
	}
	return bytesText(*f.Size)
}

func (f *file) modified() string {
	if f.Modified == nil {
		return ""
	}
	return time.UnixMilli(*f.Modified).UTC().Format(time.RFC3339)
}

func orUnknown(s string) string {
	if s == "" {
		return "?"
	}
	return s
}
