-- Destroy kept snapshots that are still the ones that were chosen: proof, bookmark and destruction
-- in one transaction group, so that nothing can come in between.
-- Arguments: "bookmark" or "none", then for each snapshot its name, "g" .. guid, "t" .. createtxg
-- (signed numbers: an argument that begins with "-" would be an option), and "k" .. the run that
-- kept it, "k" alone for one that the user named.  With "r" in the place of "k", the mark may have
-- come with the snapshot, by `zfs receive`: then its source is "$recvd" (include/sys/fs/zfs.h).
-- With "t", it must bear the transient mark of that run as well.
args = ...
argv = args["argv"]

-- is_same and bears are the proof, in the same words in destroy.lua and in prune.lua.
function is_same(name, guid, txg)
  return "g" .. tostring(zfs.get_prop(name, "guid")) == guid
    and "t" .. tostring(zfs.get_prop(name, "createtxg")) == txg
end

function bears(name, mark, run)
  value, source = zfs.get_prop(name, mark)
  return value == run and source == name
end

function came_with(name, mark, run)
  value, source = zfs.get_prop(name, mark)
  return value == run and source == "$recvd"
end

function judge(name, guid, txg, kept)
  if not zfs.exists(name) then
    return "absent"
  end
  if not is_same(name, guid, txg) then
    return "foreign"
  end
  how, keeper = string.sub(kept, 1, 1), string.sub(kept, 2)
  if keeper ~= "" and not bears(name, "atomtx:kept", keeper)
    and not (how == "r" and came_with(name, "atomtx:kept", keeper)) then
    return "unmarked"
  end
  if how == "t" and not bears(name, "atomtx:transient", keeper) then
    return "unmarked"
  end
  return "ours"
end

-- A bookmark needs room, which a destruction gives back: without it there is none.
function destroy(name, bookmark)
  err = zfs.check.destroy(name)
  if err ~= 0 then
    return "error " .. tostring(err)
  end
  left = 0
  if bookmark == "bookmark" then
    left = zfs.sync.bookmark(name, (string.gsub(name, "@", "#")))
  end
  err = zfs.sync.destroy(name)
  if err ~= 0 then
    return "error " .. tostring(err)
  end
  if left ~= 0 then
    return "no-bookmark"
  end
  return "done"
end

results = {}
for i = 2, #argv, 4 do
  verdict = judge(argv[i], argv[i + 1], argv[i + 2], argv[i + 3])
  if verdict == "ours" then
    verdict = destroy(argv[i], argv[1])
  end
  results[#results + 1] = verdict
end
return results
