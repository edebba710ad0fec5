-- Destroy, or keep, the snapshots that are proven ours: in one transaction group, so that nothing
-- can come between the proof and the effect.
-- Arguments: "destroy" or "keep", the run id, then for each snapshot its name, "g" .. guid and
-- "t" .. createtxg (signed numbers: an argument that begins with "-" would be an option).
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

function judge(name, run, guid, txg)
  if not zfs.exists(name) then
    return "absent"
  end
  if not is_same(name, guid, txg) then
    return "foreign"
  end
  if not bears(name, "atomtx:run", run) then
    return "unmarked"
  end
  return "ours"
end

function keep(name, run)
  err = zfs.sync.set_prop(name, "atomtx:kept", run)
  if err ~= 0 then
    return err
  end
  return zfs.sync.inherit(name, "atomtx:run")
end

results = {}
for i = 3, #argv, 3 do
  name = argv[i]
  verdict = judge(name, argv[2], argv[i + 1], argv[i + 2])
  if verdict == "unmarked" and argv[1] == "keep" and bears(name, "atomtx:kept", argv[2]) then
    verdict = "done"
  elseif verdict == "ours" then
    if argv[1] == "keep" then
      err = keep(name, argv[2])
    else
      err = zfs.sync.destroy(name)
    end
    if err == 0 then
      verdict = "done"
    else
      verdict = "error " .. tostring(err)
    end
  end
  results[#results + 1] = verdict
end
return results
